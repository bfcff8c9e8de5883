"""The configurations that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

from gptkern.train.errors import SettingsError

_FOLDER = Path(__file__).parents[1] / "assets" / "configs"


def names() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def config_file(name: str | Path) -> Path:
    """A configuration's file: the path where there is a file, else the shipped one of that name.

    Raises:
        SettingsError: There is neither.
    """
    path = Path(name)
    if path.exists() or str(name) not in names():
        if not path.exists() and path.suffix != ".toml":
            raise SettingsError(f"{name}: no such file; the configurations of gptkern: {', '.join(names())}")
        return path
    return _FOLDER / f"{name}.toml"
