"""PNG and JPEG files from callers: headers, decoding, and the processes that decode."""
