"""Make an index of many pages; go on where an earlier run ended, or add pages to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from npvlm.asked import Failed, Seen, Shown, name_of
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.index import PART, STORES, Origin, Page, PageIndex, pack, write_index
from npvlm.files.output import check_place, new_file
from npvlm.model.weights import Array
from npvlm.packs import Prepared, read_ahead
from npvlm.retrieval import Retriever
from npvlm.work.embed_draft import Draft, open_draft


@dataclass(frozen=True)
class Embedded:
    """How far an index is.

    total : pages that were named
    kept : those of them that an earlier run left
    done : those that are in the index by now, those included
    failed : those that could not be read
    pages : all pages of the index, those it had before and which were not named included
    """

    total: int
    kept: int
    done: int
    failed: int
    pages: int


def embed_pages(
    retriever: Retriever,
    pictures: Sequence[Path],
    output: Path,
    store: str,
    tell: Callable[[Embedded], None],
    tell_error: Callable[[str], None],
    *,
    resume: bool = False,
) -> Embedded:
    """Write an index of pages. Until it is whole, what is done lies beside it in OUTPUT.part.

    Parameters
    ----------
    pictures : one of each page; a page goes by the path of its picture
    store : how vectors are kept, one of STORES
    tell : is told at the beginning and after each page how far things are
    tell_error : is told why a page cannot be read; the others go on
    resume : keep the pages that OUTPUT and OUTPUT.part have, unless the size of a file has changed

    Raises
    ------
    UsageError
        Where one of both is there already and `resume` is not asked for, or it was made with
        another model, precision or store; for a picture that would be written over.
    NpvlmError
        Where it cannot be read or written, or no page can be read.
    """
    if store not in STORES:
        raise UsageError(f"store is {store!r}, expected one of {', '.join(STORES)}.")
    check_place(output)
    part = output.with_name(f"{output.name}{PART}")
    if any(path.resolve() in (output.resolve(), part.resolve()) for path in pictures):
        raise UsageError(f"{output} is one of the pages, expected a place for the index.")
    for path in (output, part):
        if not resume and path.exists():
            raise UsageError(
                f"{path} is there already; --resume adds pages to it, or name another file."
            )
    origin = retriever.origin(store)
    before = _before(retriever, output, origin)
    with open_draft(part, origin) as draft:
        try:
            ended = _add_pages(retriever, pictures, draft, before, store, tell, tell_error)
            if not ended.pages:
                raise NpvlmError("no page could be read, so there is no index.")
            if draft.pages:
                _assemble(output, origin, before, draft)
                draft.pages.clear()
        finally:
            if not draft.pages:  # nothing to go on with
                part.unlink()
    return ended


def _add_pages(
    retriever: Retriever,
    pictures: Sequence[Path],
    draft: Draft,
    before: PageIndex | None,
    store: str,
    tell: Callable[[Embedded], None],
    tell_error: Callable[[str], None],
) -> Embedded:
    """Embed the pages that neither the index there was nor the draft has."""
    old = {} if before is None else {page.path: page for page in before.pages}
    had = old | {path: page for path, (page, _) in draft.pages.items()}
    new = [path for path in pictures if not _is_same(had.get(str(path)), path)]
    kept = len(pictures) - len(new)
    done = failed = 0

    def progress() -> Embedded:
        pages = len(had.keys() | draft.pages.keys())
        return Embedded(len(pictures), kept, kept + done, failed, pages)

    tell(progress())
    for seen in _read(retriever, new):
        if isinstance(seen, Failed):
            failed += 1
            tell_error(seen.error)
        else:
            page = Page(seen.name, seen.width, seen.height, Path(seen.name).stat().st_size)
            draft.append(page, pack(retriever.embed_page(seen), store))
            done += 1
        tell(progress())
    return progress()


def _before(retriever: Retriever, output: Path, origin: Origin) -> PageIndex | None:
    """The index that pages are added to, if there is one and it is of the same origin."""
    if not output.exists():
        return None
    index = retriever.open(output)
    mine = index.origin
    if (mine.precision, mine.store) != (origin.precision, origin.store):
        raise UsageError(
            f"{output} was made with --precision {mine.precision} --store {mine.store}, expected "
            f"{origin.precision} and {origin.store}; add pages with the same, or name another file."
        )
    return index


def _is_same(page: Page | None, path: Path) -> bool:
    """Whether a page was made of the file as it is now, by its size."""
    try:
        return page is not None and page.bytes == path.stat().st_size
    except OSError:
        return page is not None  # the picture may be gone, its vectors are not


def _read(retriever: Retriever, pictures: Sequence[Path]) -> Iterator[Seen | Failed]:
    """Pages in their order; the files of the next ones are read while one is embedded."""

    def prepare(picture: Shown, prompt: str) -> Prepared:
        try:
            return retriever.model.prepare(picture), prompt
        except NpvlmError as error:
            return Failed(name_of(picture), prompt, str(error))

    for prepared in read_ahead(((path, "") for path in pictures), prepare):
        for entry in prepared:
            yield entry if isinstance(entry, Failed) else entry[0]


def _assemble(output: Path, origin: Origin, before: PageIndex | None, draft: Draft) -> None:
    """Write the index: the pages there were, those made anew in their place, then the new ones."""
    old = [] if before is None else before.pages
    numbers = {page.path: number for number, page in enumerate(old)}
    paths = dict.fromkeys([*numbers, *draft.pages])
    pages = [draft.pages[p][0] if p in draft.pages else old[numbers[p]] for p in paths]

    def stored() -> Iterator[Mapping[str, Array]]:
        for path in paths:
            if path in draft.pages or before is None:
                yield draft.stored(path)
            else:
                yield before.stored(numbers[path])

    with new_file(output) as file:
        write_index(file, origin, pages, stored())
