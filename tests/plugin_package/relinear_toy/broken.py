"""Cannot be imported, as a package whose native library is missing."""

raise ImportError("libtoy.so.2: cannot open shared object file")
