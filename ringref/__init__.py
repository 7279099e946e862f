"""Readable, exact long-context attention across devices, and the oracle that judges yours."""
