"Packaging; everything that can change stands in settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_name"]
readme = here/"README.md"
repo, file, site = cfg["git_url"], f"{cfg['git_url']}/blob/{cfg['branch']}/", cfg["doc_host"] + cfg["doc_baseurl"]


def elsewhere(text):
    "README.md as an index of packages shows it: links and pictures that are relative to the repository lead there."
    parts = re.split(r"(^```.*?^```$|`[^`\n]+`)", text, flags=re.M | re.S)   # code stays as it is
    def lead(m): return m[1] + (file.replace("/blob/", "/raw/") if m[2].endswith((".png", ".jpg", ".gif", ".svg")) else file) + m[2]
    parts[::2] = [re.sub(r"""(\]\(|\b(?:src|href)=")(?![a-z]+:|[#/])([^)\s"]+)""", lead, part) for part in parts[::2]]
    return "".join(parts)


setup(
    name=lib,
    version=cfg["version"],
    description=cfg["description"],
    long_description=elsewhere(readme.read_text(encoding="utf-8")) if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"].split(),
    author=cfg["author"],
    author_email=cfg["author_email"],
    project_urls={"Homepage": site, "Documentation": site, "Source": repo, "Changelog": file+"CHANGELOG.md", "Issues": repo+"/issues"},
    license="Apache-2.0",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 *(f"Programming Language :: Python :: 3{minor}" for minor in ("", ".10", ".11", ".12", ".13")),
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=[lib, lib+".*"]),
    package_data={lib: ["data/*.safetensors", "data/*.md", "weights/*/*", "static/*.html"]},
    python_requires=">="+cfg["min_python"],
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): cfg[k].split() for k in cfg if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{lib}={lib}._modidx:d"]},
    zip_safe=False,
)
