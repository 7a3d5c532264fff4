"""A generator behind a page in the browser, or a JSON endpoint, of this machine."""
