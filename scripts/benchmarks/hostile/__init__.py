"""Wrong, damaged and malicious requests: whether the server stands them all.

Every request is sent over HTTP or gRPC to a real server, by several clients at a time: values of every wrong type,
shape and size (made by hypothesis), files that are no pictures or unpack to huge ones, damaged states sent to the
stages with and without their key, bytes that are no HTTP and no protobuf, games with request ids, and callers that go
away. Fails if a process of the server ends or is replaced, a request is not answered in time, an answer is not one of
the documented ones or tells of the inside of the server, memory grows, or a good request is not served between them.
"""

from benchmarks.hostile.command import add_arguments, measure

__all__ = ["add_arguments", "measure"]
