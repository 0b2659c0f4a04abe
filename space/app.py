"""A Gradio Space that searches the pictures of an exported retriever with words, or with a picture.

The variable RETRIEVER names it: a folder, or "owner/name" on the Hugging Face Hub. On this machine:

    RETRIEVER=avg-emoji python space/app.py
"""

import os
import sys

import gradio as gr
from avg import BadInput, Found, Retriever
from PIL import Image

SIDE = 384  # pixels of a picture as it is shown
MOST = 50


def by_words(retriever: Retriever, query: str, count: int) -> tuple[list[tuple[Image.Image, str]], str]:
    """Pictures for a text, each with its label, and what is to be said of the answer."""
    unread: list[list[str]] = []
    try:
        [found] = retriever.search([query], k=int(count), unread=unread)
    except BadInput as error:
        raise gr.Error(str(error), print_exception=False) from None
    return shown(found, unread[0])


def by_picture(
    retriever: Retriever, picture: Image.Image | None, count: int
) -> tuple[list[tuple[Image.Image, str]], str]:
    """The same for a picture."""
    if picture is None:
        raise gr.Error("there is no picture: choose one", print_exception=False)
    try:
        found = retriever.search_image(picture, k=int(count))
    except BadInput as error:
        raise gr.Error(str(error), print_exception=False) from None
    return shown(found, [])


def shown(found: list[Found], notes: list[str]) -> tuple[list[tuple[Image.Image, str]], str]:
    """Pictures as the page shows them; those without a file, or with a damaged one, are named below."""
    pictures: list[tuple[Image.Image, str]] = []
    gone = [one.image for one in found if one.gone]
    if gone:
        notes = [*notes, f"found, but without a file here: {', '.join(gone)}"]
    for one in found:
        if one.gone:
            continue
        try:  # a small copy, as the file itself may lie where Gradio may not read
            pictures.append((one.thumbnail(SIDE), f"{one.score:.2f}  {one.image}"))
        except BadInput as error:
            notes = [*notes, f"found, but not shown: {error}"]
    return pictures, "\n\n".join(notes)


def make_page(retriever: Retriever) -> gr.Blocks:
    with gr.Blocks(title="AVG: text-to-image retrieval as generation") as page:
        gr.Markdown(
            "# Search by generation\n"
            f"A language model writes the code of a picture for your words; {len(retriever):,} pictures can be found."
        )
        count = gr.Slider(1, MOST, value=12, step=1, label="Pictures", render=False)
        with gr.Tab("Words"):
            query = gr.Textbox(label="What is in the picture?", placeholder="a red circle", submit_btn="Search")
        with gr.Tab("Picture"):
            picture = gr.Image(type="pil", label="A picture to search by")
            search = gr.Button("Search", variant="primary")
        count.render()
        answer = [gr.Gallery(label="Found", columns=6, object_fit="contain", height="auto"), gr.Markdown()]
        query.submit(lambda *given: by_words(retriever, *given), [query, count], answer, api_name="words")
        search.click(lambda *given: by_picture(retriever, *given), [picture, count], answer, api_name="picture")
    return page


def main() -> None:
    name = os.environ.get("RETRIEVER")
    if not name:
        sys.exit("error: set the variable RETRIEVER to an exported retriever: a folder, or owner/name on the hub")
    try:
        retriever = Retriever.from_pretrained(name)
    except BadInput as error:
        sys.exit(f"error: {error}")
    make_page(retriever).launch()


if __name__ == "__main__":
    main()
