"""A server that a campaign's tests play against: one queue, so many seconds per token, in virtual time."""

from pipemoe.traffic.served import Served


class SingleServer:
    """slowness: of each policy, a factor on all times."""

    def __init__(self, seconds_per_token, slowness=lambda policy: 1.0):
        self.seconds_per_token, self.slowness = seconds_per_token, slowness
        self.plays = []

    def alone(self, policy, lengths):
        return [
            Served(n, 0, tokens, 0.0, 0.0, tokens * self.seconds_per_token * self.slowness(policy))
            for n, tokens in enumerate(lengths)
        ]

    def play(self, policy, arrivals, stop_at=None):
        self.plays.append((policy, tuple(arrivals), stop_at is not None))
        free, served = 0.0, []
        for number, seconds, tokens in arrivals:
            begin = max(free, seconds)
            free = begin + tokens * self.seconds_per_token * self.slowness(policy)
            served.append(Served(number, 0, tokens, seconds, begin, free))
        return served
