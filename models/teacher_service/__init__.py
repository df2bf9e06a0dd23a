"""Teachers over HTTP: a small authenticated service around `Scorer`s, and the `Scorer` that talks to it."""
