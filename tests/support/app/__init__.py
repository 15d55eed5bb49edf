"""The web page of the tests: the server in a process of its own, a browser in another."""
