"""Neptune's own client, in a process of its own that can be killed: every call ends, one way or another.

The client has waits without an end: an upload to a hung server, a queue that no server empties. It also keeps
state for a whole process: environment, log handlers, exit hooks. So it lives in a child process:

- `address`: what a URI and an API token say,
- `process`: the child as this process sees it: start, one call at a time, kill,
- `worker`: the child's own side of that,
- `operations`: what is done with the client inside the child,
- `client`: the calls, for a registry and a source, with their errors.
"""
