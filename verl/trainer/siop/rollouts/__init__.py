"""How rollouts are made and looked at: agent loop, tool calls, rows of the data, metrics, alarms of the first steps."""
