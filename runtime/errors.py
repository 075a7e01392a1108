"""Bad input: the one kind of error that a user can mend."""


class InputError(ValueError):
    """The user's input cannot be used: where, what is wrong, and what to do about it.

    `place` names the file, folder or flag. As text the three make one sentence, "place: problem; remedy.",
    which every command prints before it ends with exit code 2. It can be pickled, so worker processes may
    raise it.
    """

    def __init__(self, place: object, problem: str, remedy: str = "") -> None:
        super().__init__(str(place), problem, remedy)
        self.place = str(place)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}{'; ' + self.remedy if self.remedy else ''}."
