"""The same model whole in one vLLM engine, and split over an engine and expert workers, on the same cores."""
