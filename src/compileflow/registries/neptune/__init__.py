"""neptune: a project of a Neptune server as model registry, and the client that registry and source share.

The registry:

- `registry`: the model registry,
- `listing`: which versions a project holds,
- `lineage`: the list of compiled versions in their source version,
- `fields`: the fields and files of a version.

Some waits of the client never end: an upload to a hung server, a queue that no server empties. It also changes a
whole process: environment, log handlers, exit hooks. Therefore it runs in a child process, where every call ends:

- `address`: the content of a URI and of an API token,
- `calls`: the calls, with deadlines and errors,
- `client_process`: the child as this process sees it: start, one call at a time, kill,
- `client_child`: the child's own side,
- `client_session`: the work with the client inside the child.
"""
