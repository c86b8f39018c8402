"""Mode "auto": the candidates, their figures, the search, and the choice."""
