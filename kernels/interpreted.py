"""Makes Triton's interpreter twice as fast with identical results.

Before each call of a function inside a kernel, the interpreter redefines every name of triton.language. Once per launch
is enough, since a launch's redefinitions last until it ends.
"""

from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterError, _patch_lang


def redefine_once_a_launch() -> None:
    """Patch the interpreter of this process to redefine triton.language once per function and launch."""
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
