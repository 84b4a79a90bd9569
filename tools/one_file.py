#!/usr/bin/env python
"""The living network as one HTML file that opens by double click, without a network or a server.

A browser that reads a file from a disk loads no modules, fetches nothing and starts no worker from another file, so all of it
stands in the file: the modules, each as a function that returns what it exports, the weights in base64, and the worker as text.
"""
import argparse
import base64
import json
import re
from pathlib import Path


def function_of(source):
    "A module as an expression: what it exports, as an object."
    names = re.findall(r"^export (?:async )?(?:function|const) (\w+)", source, re.M)
    body = re.sub(r"^import \* as (\w+) from \"\./(\w+)\.mjs\";", r"const \1 = \2_module;", source, flags=re.M)
    body = re.sub(r"^import (\{[^}]*\}) from \"\./(\w+)\.mjs\";", r"const \1 = \2_module;", body, flags=re.M)
    body = re.sub(r"^export ", "", body, flags=re.M).replace("import.meta.url", '""')      # of what is loaded: nothing is
    return f"(() => {{\n{body}\nreturn {{{', '.join(names)}}};\n}})()"


def script(folder, names):
    "These modules as one script without modules, the ones that others need first."
    return "\n".join(f"const {n}_module = {function_of((folder/f'{n}.mjs').read_text(encoding='utf-8'))};" for n in names)


def parts_of(page):
    "(part, heading, sentence) of what is alive on a page of Markdown; the first stands above all headings."
    for section in re.split(r"^#+ ", page, flags=re.M)[1:]:
        heading, _, text = section.partition("\n")
        for part in re.findall(r'data-part="(\w+)"', text):
            said = next((p for p in text.strip().split("\n\n") if re.match(r"\w", p)), "") if not text.lstrip().startswith(">") else ""
            yield part, heading, re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", said)


def one_file(root):
    "The text of the file, from the project at `root`: its page, its modules, the digits network."
    folder, model = root/"nbs/live", root/"ddpm_nbdev/weights/digits"
    cells = json.loads((root/"nbs/live.ipynb").read_text(encoding="utf-8"))["cells"]
    page = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = lambda code: json.dumps(code).replace("</", "<\\/")
    weights = base64.b64encode((model/"model.safetensors").read_bytes()).decode()
    body = "\n".join(f"<h{1+(i > 0)}>{heading}</h{1+(i > 0)}>\n<p>{sentence}</p>\n<div class=\"live\" data-part=\"{part}\"></div>" for i, (part, heading, sentence) in enumerate(parts_of(page)))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The living network</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 860px; margin: 1rem auto; padding: 0 1rem; color: #212529; background: #fff; }}
.quarto-dark body {{ color: #dee2e6; background: #212529; }}
{(folder/'live.css').read_text(encoding='utf-8')}
</style></head><body>
{body}
<script>
if (matchMedia("(prefers-color-scheme: dark)").matches) document.documentElement.classList.add("quarto-dark");
globalThis.DDPM_INSIDE = {{
  worker: () => new Worker(URL.createObjectURL(new Blob([{text(script(folder, ['ddpm', 'worker']))}], {{type: "text/javascript"}}))),
  weights: () => Uint8Array.from(atob("{weights}"), c => c.charCodeAt(0)).buffer,
  config: {text((model/'config.json').read_text(encoding='utf-8'))},
}};
{script(folder, ['ddpm', 'kit', 'digit', 'pixel', 'plane', 'page'])}
</script></body></html>
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FILE", help="what to write, such as living-network.html")
    args = parser.parse_args()
    args.out.write_text(one_file(Path(__file__).resolve().parents[1]), encoding="utf-8")


if __name__ == "__main__": main()
