"""HTTP beneath both services: a port, a head, a body, its content.

A request passes :mod:`server` (the port, limits on the head), :mod:`limits` (the whole body within its limits) and
:mod:`json_body` (the body checked beside the event loop; what is wrong with it is answered without repeating it).
:mod:`content` (digests, gzip) and :mod:`packed` (MessagePack) stand alone, so that clients can import them without a
server.
"""
