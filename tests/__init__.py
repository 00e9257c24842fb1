"""The suite. It is a package, so that tests share code by `from tests.x import y` however pytest is started."""
