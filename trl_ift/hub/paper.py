"""The entry of a paper in the model card."""


def arxiv_paper(arxiv_id: str, key: str, title: str, authors: str, year: int) -> dict[str, str]:
    """What a trainer's `_paper` holds, with the BibTeX entry of a paper on arXiv.

    Args:
        arxiv_id: As in `"2402.13228"`.
        key: BibTeX key.
        title: Title.
        authors: Names with ` and ` between them.
        year: Year of the first version.
    """
    citation = "\n".join(
        (
            f"@misc{{{key},",
            f"    title         = {{{{{title}}}}},",
            f"    author        = {{{authors}}},",
            f"    year          = {year},",
            f"    eprint        = {{{arxiv_id}}},",
            "    archivePrefix = {arXiv},",
            f"    url           = {{https://arxiv.org/abs/{arxiv_id}}},",
            "}",
        )
    )
    return {"title": title, "id": arxiv_id, "citation": citation}
