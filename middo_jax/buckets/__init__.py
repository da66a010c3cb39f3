"""Folders and files in buckets, gs:// and s3://, each with a copy on this machine that programs work in.

places.py: URLs, and where the copies are. store.py: objects, through fsspec. names.py: which files are
copied, and in which order. mirror.py: a folder and its copy. lease.py: one writing process at a time.
working.py: a folder that a command writes. reading.py: what is only read. keeping.py: what is only added to.
docs/design.md explains why there is a copy.
"""

from middo_jax.buckets.places import Place, shown, with_urls
from middo_jax.buckets.reading import here, read_only, send
from middo_jax.buckets.working import working

__all__ = ["Place", "here", "read_only", "send", "shown", "with_urls", "working"]
