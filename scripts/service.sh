# Sourced by the launchers, after common.sh: starts, watches and stops a background service.
#
# A service runs in a session of its own; NAME.pid and NAME.log in LOG_DIR are its process id and its output. Its
# environment carries SIOP_SERVICE=NAME, so that a recycled process id is never taken for it, SIOP_SERVICE_PORT and
# SIOP_SERVICE_HEALTH. Of one name there is one service in a LOG_DIR.
# shellcheck shell=bash

LOG_DIR=${LOG_DIR:-logs}

service_log() { echo "$LOG_DIR/$1.log"; }

# Address at which this machine reaches a service that listens on HOST, as it stands in a URL.
service_address() {
    case $1 in
        0.0.0.0 | ::) echo 127.0.0.1 ;;
        *:*) echo "[$1]" ;;
        *) echo "$1" ;;
    esac
}

# For a server of this project: it uses nothing that verl's plugins register, and loading them takes a third of its start.
without_plugins() { export VERL_USE_EXTERNAL_PLUGINS=${VERL_USE_EXTERNAL_PLUGINS:-none}; }

# Process id of the service NAME if it runs; fails otherwise.
service_pid() {
    local pid
    { read -r pid <"$LOG_DIR/$1.pid"; } 2>/dev/null || return 1
    [[ $pid =~ ^[0-9]+$ ]] || return 1
    tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | grep -qx "SIOP_SERVICE=$1" || return 1
    echo "$pid"
}

# service_said PID NAME: value of the variable NAME in the environment of the service PID.
service_said() { tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | sed -n "s/^$2=//p"; }

# Last lines of a log, of each what a progress bar has left to see.
log_tail() { tail -n "$1" "$2" | sed 's/\r*$//; s/.*\r//'; }

# Last line of a log with something in it.
log_line() {
    local line
    line=$(log_tail 20 "$1" | grep '[^[:space:]]' | tail -n 1 | cut -c 1-160) || line="no output yet"
    echo "$line"
}

# The call of a launcher with the LOG_DIR that it needs to find a service started here.
service_call() {
    local set=
    [[ $LOG_DIR == logs ]] || printf -v set 'LOG_DIR=%q ' "$LOG_DIR"
    echo "${set}bash $*"
}

# Through /proc, because slim containers have no pgrep.
# Living processes of the session SID: the service with all that it started (Ray's processes are in it too).
session_members() {
    local stat line fields
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue
        read -ra fields <<<"${line##*) }" # state, parent, group, session, ...
        if [[ ${fields[3]} == "$1" && ${fields[0]} != Z ]]; then
            line=${stat#/proc/}
            echo "${line%/stat}"
        fi
    done
}

# service_healthy URL, or service_healthy tcp://HOST:PORT, which asks no more than that the port is open.
service_healthy() {
    local rest
    if [[ $1 == tcp://* ]]; then
        rest=${1#tcp://}
        (exec 3<>"/dev/tcp/${rest%:*}/${rest##*:}") 2>/dev/null
    elif command -v curl >/dev/null; then
        curl --noproxy '*' -fsS -m 5 -o /dev/null "$1" 2>/dev/null
    else
        "$PYTHON" -c 'import sys, urllib.request as r
r.build_opener(r.ProxyHandler({})).open(sys.argv[1], timeout=5)' "$1" 2>/dev/null
    fi
}

# Ends the session SID: SIGTERM, then SIGKILL for what is left after 45 s.
session_end() {
    local sid=$1 i member
    kill -TERM "$sid" 2>/dev/null || true
    for ((i = 0; i < 450; i++)); do
        [[ -n $(session_members "$sid") ]] || return 0
        # Without its leader nobody will stop the others.
        if ((i >= 50)) && ! kill -0 "$sid" 2>/dev/null; then break; fi
        sleep 0.1
    done
    for member in $(session_members "$sid"); do
        kill -KILL "$member" 2>/dev/null || true
    done
}

# service_arguments SCRIPT [ACTION] [--dry-run] [-- OPTION ...]: sets ACTION (start), DRY_RUN and OPTIONS from the
# arguments of a launcher.
# shellcheck disable=SC2034  # for the scripts that source this file
service_arguments() {
    local script=$1
    shift
    ACTION=start DRY_RUN=
    if [[ $# -gt 0 && $1 != -* ]]; then
        ACTION=$1
        shift
    fi
    if [[ ${1:-} == --dry-run ]]; then
        [[ $ACTION == start ]] || die "--dry-run is for start, not for $ACTION"
        DRY_RUN=1
        shift
    fi
    if [[ ${1:-} == -- ]]; then
        shift
    elif [[ $# -gt 0 ]]; then
        die "unknown argument '$1'; see bash ${script##*/} --help"
    fi
    OPTIONS=("$@")
}

# service_start NAME HOST PORT HEALTH TIMEOUT COMMAND...: starts COMMAND in the background and waits until HEALTH (a URL
# or tcp://HOST:PORT) answers. If it does not, shows the log's last lines, leaves nothing running and fails.
service_start() {
    local name=$1 host=$2 port=$3 health=$4 timeout=$5 pid log started reported
    shift 5
    log=$(service_log "$name")
    # Held until this script ends: of two starts at once, one would remove the other's PID file.
    mkdir -p "$LOG_DIR"
    exec 9>"$LOG_DIR/$name.lock"
    flock -n 9 || die "$name is just being started by someone else (lock $LOG_DIR/$name.lock)"
    if pid=$(service_pid "$name"); then
        die "$name is already running on port $(service_said "$pid" SIOP_SERVICE_PORT) (process $pid, log $log); stop it" \
            "($(service_call "$0" stop)), or start another one beside it with a LOG_DIR and a port of its own"
    fi
    port_is_free "$port" || die "$name: port $port is in use; stop what listens there or choose another port"
    [[ ! -f $log ]] || mv "$log" "$log.1"

    say "starting $name on $host:$port, log: $log"
    env "SIOP_SERVICE=$name" "SIOP_SERVICE_PORT=$port" "SIOP_SERVICE_HEALTH=$health" PYTHONUNBUFFERED=1 setsid nohup "$@" </dev/null >"$log" 2>&1 9>&- &
    pid=$!
    echo "$pid" >"$LOG_DIR/$name.pid"
    trap 'say "interrupted: stopping '"$name"'"; session_end '"$pid"'; rm -f "$LOG_DIR/'"$name"'.pid"; exit 130' \
        INT TERM
    started=$SECONDS reported=$SECONDS
    while ! service_healthy "$health"; do
        if ! kill -0 "$pid" 2>/dev/null || ((SECONDS - started >= timeout)); then
            if kill -0 "$pid" 2>/dev/null; then
                echo "error: $name did not answer at $health within $timeout s" >&2
            else
                echo "error: $name ended while it was starting" >&2
            fi
            session_end "$pid"
            rm -f "$LOG_DIR/$name.pid"
            echo "last lines of $log:" >&2
            log_tail 20 "$log" >&2
            return 1
        fi
        if ((SECONDS - reported >= 10)); then
            reported=$SECONDS
            say "waiting for $name, $((SECONDS - started)) of $timeout s: $(log_line "$log")"
        fi
        sleep 0.2
    done
    trap - INT TERM
    # The port may have been taken by someone else in the meantime: then the service is gone.
    kill -0 "$pid" 2>/dev/null || {
        log_tail 20 "$log" >&2
        die "$name ended, but something else answers at $health"
    }
    say "$name is ready after $((SECONDS - started)) s (process $pid)"
}

# service_found NAME PORT: sets PID to the service NAME; fails if there is none, and ends the launcher if PORT (empty: any)
# is another one than the service's.
service_found() {
    local port
    if ! PID=$(service_pid "$1"); then
        say "$1 is not running$([[ $LOG_DIR == logs ]] || echo " (LOG_DIR=$LOG_DIR)")"
        return 1
    fi
    port=$(service_said "$PID" SIOP_SERVICE_PORT)
    [[ -z $2 || -z $port || $port == "$2" ]] ||
        die "$1 of LOG_DIR=$LOG_DIR listens on port $port (process $PID), not on $2: name that port, or the LOG_DIR of the" \
            "one on $2"
}

# service_stop NAME PORT: stops the service and all its processes, and waits for them. PORT: see service_found.
service_stop() {
    if service_found "$1" "$2"; then
        session_end "$PID"
        say "$1 is stopped"
    fi
    rm -f "$LOG_DIR/$1.pid"
}

# service_status NAME PORT: says how the service is; fails unless it is healthy. PORT: see service_found.
service_status() {
    local where
    service_found "$1" "$2" || return 1
    where="on port $(service_said "$PID" SIOP_SERVICE_PORT) (process $PID, log $(service_log "$1"))"
    if service_healthy "$(service_said "$PID" SIOP_SERVICE_HEALTH)"; then
        say "$1 is healthy $where"
    else
        say "$1 is running but not healthy $where"
        return 1
    fi
}
