"""Errors that a user can act on; each message names what was given, the rule and the fix."""


class MpqError(ValueError):
    """Base of every error that mpq raises on purpose."""


class FormatError(MpqError):
    """A number format or a scheme that does not parse or can't be used here."""


class GraphError(MpqError):
    """A model whose layers can't be found, run or named."""


class DataError(MpqError):
    """Calibration or evaluation data that is empty, broken or does not fit the model."""


class BudgetError(MpqError):
    """A budget that does not parse, contradicts another or can't be reached."""


class UnreachableError(BudgetError):
    """A budget that no config in the search space meets."""


class ExportError(MpqError):
    """A config that a downstream tool can't load, or an option that its exporter does not know."""


class ConfigError(MpqError):
    """A BitConfig file that is damaged, of another version, or made for another model."""
