"""How rows are read: the user's names of columns and roles, and whether faults are repaired."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from middo_jax.config.settings import DataSettings
from middo_jax.data.turns import listed

_ROLE_KEYS = {"role", "from"}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What `data.*` says of a row.

    Attributes:
      strict: refuse a row whose turns are no conversation, instead of repairing it.
      roles: names of roles -> the role that each is.
      columns: names of columns as a format has them -> the user's names.
      id_column: the column with the user's own ids; None: `id`, if its values are unique.
    """

    strict: bool = False
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    id_column: str | None = None

    @classmethod
    def of(cls, settings: DataSettings) -> Reading:
        """As the settings ask for."""
        return cls(settings.strict, settings.roles, settings.columns, settings.id_column)

    def apply(self, row: Any) -> Any:
        """A row with the names that formats use. Another column of such a name becomes `extra_NAME`.

        columns {"output": "best"}, row {"best": "5", "output": "4"}  ->  {"output": "5", "extra_output": "4"}
        """
        if not isinstance(row, dict):
            return row
        if self.columns:
            ours = {theirs: name for name, theirs in self.columns.items()}
            displaced = self.columns.keys() - self.columns.values()
            names = (ours.get(name, f"extra_{name}" if name in displaced else name) for name in row)
            row = dict(zip(names, row.values(), strict=True))
        return {name: self._with_roles(value) for name, value in row.items()} if self.roles else row

    def missing_columns(self, names: Collection[str]) -> list[str]:
        """The user's columns of `columns` that are not among the columns of the rows."""
        return [theirs for theirs in self.columns.values() if theirs not in names]

    def _with_roles(self, value: Any) -> Any:
        turns = listed(value)
        if not isinstance(turns, list) or not any(
            isinstance(t, dict) and t.keys() & _ROLE_KEYS for t in turns
        ):
            return value
        return [self._with_role(turn) if isinstance(turn, dict) else turn for turn in turns]

    def _with_role(self, turn: dict[str, Any]) -> dict[str, Any]:
        texts = {key: turn[key] for key in _ROLE_KEYS if isinstance(turn.get(key), str)}
        named = {key: self.roles[text] for key, text in texts.items() if text in self.roles}
        return {**turn, **named}


AS_IT_IS = Reading()
