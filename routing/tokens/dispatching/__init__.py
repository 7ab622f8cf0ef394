"""The parts of the dispatch client, one concern each; `routing.tokens.client` puts them together."""
