"""Where drawn pictures and cut-outs go, so that none of them takes the place of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from npvlm.answers.detection import Detection
from npvlm.errors import UsageError
from npvlm.files.listing import picture_suffixes
from npvlm.files.output import check_place, resolved, save_picture


class Gallery:
    """A file for one drawn picture, or a folder for any number; and a folder for cut-outs.

    Parameters
    ----------
    output : a name that ends in .png is a file, any other a folder, which is made; None draws none
    cutouts : a folder, which is made; None cuts nothing out
    sources : the pictures that are asked about, which are never written over
    named : the files and folders that they were named by: in such a folder nothing is drawn, or it
        would be asked about the next time

    Raises
    ------
    UsageError
        Where a source would be written over, several pictures are to go into one file, or there is
        no such place.
    NpvlmError
        Where a place may not be written to.
    """

    def __init__(
        self,
        output: Path | None,
        cutouts: Path | None,
        sources: Sequence[Path],
        named: Sequence[Path],
    ) -> None:
        self._sources = {resolved(path) for path in sources}
        others = picture_suffixes() - {".png"}
        if output and not output.is_dir() and output.suffix.lower() in others:
            raise UsageError(f"{output}: drawn pictures are PNG; name one, or a folder.")
        self._file = output if output and _is_png(output) and not output.is_dir() else None
        self._folder = None if self._file else output
        self._cutouts = cutouts
        self._taken: set[Path] = set()
        self.drawn = self.cut = 0  # how many pictures were written
        if self._file is not None:
            if len(sources) > 1:
                said = f"{self._file} is one file, expected a folder for {len(sources)} pictures."
                raise UsageError(said)
            check_output(self._file, ".png", sources)
        for folder in filter(None, (self._folder, cutouts)):
            for name in named:
                if name.is_dir() and resolved(folder).is_relative_to(resolved(name)):
                    raise UsageError(
                        f"{folder} lies in {name}, whose pictures are asked about; name another."
                    )
            make_folder(folder)

    def add(self, found: Detection) -> None:
        """Draw one picture's things and cut them out, as far as that is asked for."""
        stem = Path(str(found.answer.image)).stem.strip("-") or "picture"
        if self._file is not None:
            found.draw(self._file)
            self.drawn += 1
        elif self._folder is not None:
            found.draw(self._new(self._folder, stem))
            self.drawn += 1
        if self._cutouts is not None:
            for number, box in enumerate(found.boxes, 1):
                save_picture(found.cut_out(box), self._new(self._cutouts, f"{stem}-{number}"))
                self.cut += 1

    def _new(self, folder: Path, stem: str) -> Path:
        """A name that nothing of this run has, and no picture that is asked about."""
        path, number = folder / f"{stem}.png", 2
        while resolved(path) in self._taken | self._sources:
            path, number = folder / f"{stem}-{number}.png", number + 1
        self._taken.add(resolved(path))
        return path


def check_output(path: Path, ending: str, sources: Sequence[Path]) -> None:
    """Refuse a place for one file that ends otherwise, is a source, or cannot be written.

    Raises
    ------
    UsageError, NpvlmError
        As `Gallery`.
    """
    if path.suffix.lower() != ending:
        raise UsageError(f"{path} is no name for it, expected one that ends in {ending}.")
    if resolved(path) in {resolved(source) for source in sources}:
        raise UsageError(f"{path} is a picture that is asked about; name another place.")
    check_place(path)


def make_folder(folder: Path) -> None:
    """Make a folder and those around it.

    Raises
    ------
    UsageError, NpvlmError
        As `Gallery`.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, expected a folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made: {error.strerror}; name another.") from None
    check_place(folder / "new")


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"
