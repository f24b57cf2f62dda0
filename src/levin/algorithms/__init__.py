"""One file per algorithm. README.md maps the lecture onto them."""
