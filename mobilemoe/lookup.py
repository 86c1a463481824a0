"""Prompt lookup: drafts of the next tokens from earlier text, and how many of them are worth a verification.

Text that edits or quotes its prompt repeats runs of tokens. Where the last tokens occurred before, those that followed
there are a draft; the model computes all of them in one call and keeps them up to the first one that it would not have
chosen. The text is that of decoding token by token. From https://github.com/apoorvumang/prompt-lookup-decoding
"""

# Lengths of the runs that are looked up, the longer one first.
NGRAM_LENGTHS = (3, 2)
# Weights of the newest value in the running means of acceptance and of time.
ACCEPTANCE_WEIGHT = 1 / 8
TIME_WEIGHT = 1 / 2
# Time of a token in a draft, in decoding steps, until it is measured: low, so that longer drafts are tried.
TIME_PER_DRAFT_TOKEN = 0.2
# What a decoding step forgets of the measured times, so that a length that once took long is tried again.
FORGOTTEN = 1 / 2048
# Least expected gain, in tokens per time, of a draft.
LEAST_GAIN = 1.05


def running_mean(mean: float, seconds: float) -> float:
    # Not the whole of an interruption by another process.
    return mean + TIME_WEIGHT * (min(seconds, 2 * mean) - mean)


class VerificationTimes:
    """
    Running means of the time of a call that verifies a draft, over that of one token.

    Args:
        max_draft_tokens (`int`): length of the longest draft.
    """

    def __init__(self, max_draft_tokens: int):
        self._step: float | None = None
        self._assumed = [1 + TIME_PER_DRAFT_TOKEN * length for length in range(max_draft_tokens + 1)]
        self.ratios = list(self._assumed)

    def record(self, num_draft_tokens: int, seconds: float) -> None:
        """The time of a call of a token and a draft, which may be empty."""
        if self._step is None:
            self._step = seconds / self.ratios[num_draft_tokens]
        if num_draft_tokens:
            ratio = self.ratios[num_draft_tokens]
            self.ratios[num_draft_tokens] = running_mean(ratio, seconds / self._step)
            return
        self._step = running_mean(self._step, seconds)
        for length, assumed in enumerate(self._assumed):
            self.ratios[length] += FORGOTTEN * (assumed - self.ratios[length])

    def best_length(self, acceptance: float, longest: int) -> int:
        """The length of a draft that gives most tokens per time, 0 for none, if each token is accepted so often."""
        best, best_rate, tokens, time = 0, LEAST_GAIN, 1.0, 1.0
        for length in range(1, min(longest, len(self.ratios) - 1) + 1):
            tokens += acceptance**length
            # A longer draft takes longer, also where it has not been measured.
            time = max(time + TIME_PER_DRAFT_TOKEN, self.ratios[length])
            if tokens / time > best_rate:
                best, best_rate = length, tokens / time
        return best


class PromptLookup:
    """
    The text so far, and its predictions of the next tokens.

    Args:
        tokens (`list[int]`): the prompt.
        times (`VerificationTimes`): of the model, kept from one text to the next.
    """

    def __init__(self, tokens: list[int], times: VerificationTimes):
        self.times = times
        self.tokens: list[int] = []
        # By run of tokens: the position after its last occurrence.
        self._after: dict[tuple[int, ...], int] = {}
        # The position of the predicted next token.
        self._source: int | None = None
        for token in tokens:
            self._add(token)
        # Of predictions, whether or not they were verified: a decoded token tells as much of the next prediction.
        self.acceptance = 0.5

    def append(self, token: int) -> None:
        """Adds a token that the model chose."""
        if self._source is not None:
            accepted = self.tokens[self._source] == token
            self.acceptance += ACCEPTANCE_WEIGHT * (accepted - self.acceptance)
        self._add(token)

    def _add(self, token: int) -> None:
        follows = self._source is not None and self.tokens[self._source] == token
        self.tokens.append(token)
        runs = [tuple(self.tokens[-length:]) for length in NGRAM_LENGTHS]
        # What has continued is followed: a new search might end at a shorter match.
        if follows:
            self._source += 1
        else:
            self._source = next((self._after[run] for run in runs if run in self._after), None)
        for run in runs:
            self._after[run] = len(self.tokens)

    def draft(self, longest: int) -> list[int]:
        """Tokens that are worth a verification, at most `longest`."""
        draft: list[int] = []
        if self._source is None:
            return draft
        for position in range(self._source, self._source + self.times.best_length(self.acceptance, longest)):
            # A draft may repeat itself, as does text in a loop.
            behind = position - len(self.tokens)
            draft.append(self.tokens[position] if behind < 0 else draft[behind])
        return draft
