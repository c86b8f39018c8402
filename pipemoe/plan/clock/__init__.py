"""A plan on a discrete-event clock: what a layer's operations take, the rules, the clock, and what it predicts."""
