#!/usr/bin/env python3
"""Makes the bilingual corpus from Debian 12 packages.

    python3 configs/corpus/build.py                  the sample beside this script (about 6 MB)
    python3 configs/corpus/build.py --full [DIR]     everything (about 75 MB) into DIR (full/ beside this script)

Needs apt-get and dpkg-deb, and nothing else but Python's standard library. Each domain becomes DOMAIN.jsonl, one document
a line: {"text": ..., "source": "package:path#part"}. PROVENANCE.json beside them holds the hash of each file, and the
packages it was made from by version, hash, licence and copyright. Elsewhere than beside this script, README.md and the
texts of the licences are put there too. The same packages give the same bytes: nothing depends on time, locale or the
order of a directory. So each package is asked for in the version that PROVENANCE.json beside this script names; where
the archive no longer has it, the present one is taken and a warning says so. Of a package that only the full corpus has,
the version stands below.

Steps: extract text (HTML by leaf blocks, man pages by a small roff reader, reStructuredText and YAML as they are); cut long
texts at headings and paragraphs; drop Chinese documents with less than 15% Han; drop lines that occurred before anywhere
in the corpus, and then documents of whose 24-character shingles half occurred before (code: only the latter); for the
sample, keep a share of each domain's documents chosen by their hash.
"""

import argparse
import base64
import gzip
import hashlib
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
DOCUMENT_BYTES = 6000  # of UTF-8; a longer text is cut
DOCUMENT_CHARS_MIN = 80
HAN_MIN = 0.15
SHINGLE_CHARS = 24
SHINGLE_SEEN_MAX = 0.5

# domain: (language, bytes in the sample; 0 for none, readers). Earlier domains keep what later ones repeat.
DOMAINS = {}


def domain(name, language, sample_bytes):
    def register(reader):
        DOMAINS[name] = (language, sample_bytes, reader)
        return reader

    return register


# Licence (SPDX) and copyright of what is taken, as the package's copyright file says; by package, and by domain and
# package where a domain takes only files under other terms. Each licence has its text in licences/.
LINUX = "1991-2022 Linus Torvalds and many others"
MANPAGES_ZH = (
    "2005 Carlos Z.F. Liu; 2008 LI Daobing; 2008 Ji ZhengYu; 2000-2004 CMPP Project; 2016-2020 Boyuan Yang; "
    "intro.6: 1993 Michael Haardt; kill.1: Albert Cahalan, Michael K. Johnson; epoll.7: 2003 Davide Libenzi, 2021 Phi-Li"
)
INSTALLER = (
    "1996 Bruce Perens; 1996, 1997 Sven Rudolph; 1998 Igor Grobman, James Treacy; 1998-2002 Adam Di Carlo; "
    "2003 Chris Tillman; 2004-2023 the Debian Installer team, and other contributors"
)
LIBREOFFICE = "2000, 2010 Oracle and/or its affiliates; 2000, 2010 LibreOffice contributors and/or their affiliates"
LICENCES = {
    "anarchism": ("GPL-2.0-or-later", "1995-2017 The Anarchist FAQ Editorial Collective"),
    "debian-handbook": (  # offered under CC-BY-SA-3.0 too; taken under the GPL
        "GPL-2.0-or-later",
        "2003-2015 Raphaël Hertzog; 2006-2015 Roland Mas; 2013-2015 Freexian SARL; and translators",
    ),
    "debian-reference-en": ("GPL-2.0-or-later", "2007-2013 Osamu Aoki"),
    "debian-reference-zh-cn": ("GPL-2.0-or-later", "2007-2013 Osamu Aoki, and translators"),
    "dict-gcide": ("GPL-2.0-or-later", "the GCIDE's editors and contributors (after Webster, 1913)"),
    "fortunes-zh": ("GPL-3.0-or-later", "2001-2009 Yu Guanghui; 2015-2019 Mo Zhou; 2020-2021 xiao sheng wen"),
    "installation-guide-amd64": ("GPL-2.0-only", INSTALLER),
    "libreoffice-help-en-us": ("MPL-2.0 AND Apache-2.0", LIBREOFFICE),
    "libreoffice-help-zh-cn": ("MPL-2.0 AND Apache-2.0", LIBREOFFICE),
    "linux-doc-6.1": ("GPL-2.0-only", LINUX),
    "manpages-zh": ("GFDL-1.2-or-later AND GPL-2.0-only AND GPL-2.0-or-later", MANPAGES_ZH),
    ("code", "linux-doc-6.1"): ("GPL-2.0-only OR BSD-2-Clause", "each file's own notice, kept in its text"),
}


def licence(domain_name, package):
    found = LICENCES.get((domain_name, package)) or LICENCES.get(package)
    if not found:
        sys.exit(f"{package}: has no entry in LICENCES; read its copyright file and add one")
    return dict(zip(("licence", "copyright"), found))


# What only the full corpus is made from; the packages of the sample stand in PROVENANCE.json.
PINNED_FULL = {
    "anarchism": {
        "version": "15.3-3",
        "sha256": "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
    }
}


def pinned():
    """Packages by name, as the corpus beside this script was made from them, and those of the full corpus."""
    path = os.path.join(HERE, "PROVENANCE.json")
    if not os.path.exists(path):
        return PINNED_FULL
    with open(path, encoding="utf-8") as file:
        sample = {package["package"]: package for entry in json.load(file) for package in entry["packages"]}
    return PINNED_FULL | sample


class Packages:
    """Downloads and unpacks packages once each, in the pinned version where there is one and the archive has it."""

    def __init__(self, folder, pins):
        self.folder, self.pins = folder, pins
        self.known = {}

    def download(self, name, into):
        """The package's file, of the pinned version or else the present one."""
        pin = self.pins.get(name)
        for wanted in [f"{name}={pin['version']}", name] if pin else [name]:
            print(f"fetching {wanted}", file=sys.stderr)
            if not subprocess.run(["apt-get", "download", "-qq", wanted], cwd=into, stderr=subprocess.DEVNULL).returncode:
                (deb,) = os.listdir(into)
                return deb
        sys.exit(f"apt-get download {name} failed; run apt-get update (on Debian 12) and try again")

    def warn_of_another(self, name, version, digest):
        pin = self.pins.get(name, {"version": version, "sha256": digest})
        if pin["version"] != version:
            print(f"warning: {name} is {version}, not {pin['version']}: other bytes will come out", file=sys.stderr)
        elif pin["sha256"] != digest:
            print(f"warning: {name} {version} has SHA-256 {digest}, not {pin['sha256']}", file=sys.stderr)

    def path(self, name):
        if name not in self.known:
            into = os.path.join(self.folder, name)
            os.mkdir(into)
            deb = self.download(name, into)
            with open(os.path.join(into, deb), "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
            version = subprocess.run(
                ["dpkg-deb", "-f", os.path.join(into, deb), "Version"], check=True, capture_output=True, text=True
            ).stdout.strip()
            self.warn_of_another(name, version, digest)
            root = os.path.join(into, "root")
            subprocess.run(["dpkg-deb", "-x", os.path.join(into, deb), root], check=True)
            self.known[name] = (root, {"package": name, "version": version, "sha256": digest})
        return self.known[name][0]

    def files(self, package, folder, pattern):
        """(name, bytes) of the package's files under `folder` whose path there matches, sorted, decompressed."""
        top = os.path.join(self.path(package), folder)
        if not os.path.isdir(top):
            sys.exit(f"{package}: has no folder {folder}; the package has changed, adapt this script")
        names = []
        for here, _, files in os.walk(top):
            names += [os.path.relpath(os.path.join(here, name), top) for name in files]
        for name in sorted(name for name in names if re.fullmatch(pattern, name)):
            path = os.path.join(top, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            with open(path, "rb") as file:
                data = file.read()
            if name.endswith((".gz", ".dz")):
                data = gzip.decompress(data)
            yield f"{package}:{folder}/{name}", data


# --- from markup to text ---------------------------------------------------------------------------------------------


class Leaves(html.parser.HTMLParser):
    """Text of an HTML page, one paragraph for each innermost block."""

    BLOCKS = {
        "address", "blockquote", "body", "caption", "dd", "div", "dl", "dt", "figcaption", "h1", "h2", "h3", "h4", "h5",
        "h6", "hr", "li", "ol", "p", "pre", "section", "table", "tbody", "td", "th", "thead", "tr", "ul", "article",
    }
    SKIPPED = {"script", "style", "head", "header", "footer", "nav", "aside", "noscript", "button", "form"}
    # Navigation, and LibreOffice's variant for another system.
    SKIPPED_CLASSES = {"navheader", "navfooter", "docnav", "mac", "MAC"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks, self.current = [], []
        self.verbatim, self.heading = 0, False
        self.skipped_tag, self.skipped_depth = None, 0

    def close_block(self):
        text = "".join(self.current)
        self.current = []
        if not self.verbatim:
            text = re.sub(r"\s+", " ", joined(text))
        text = text.strip("\n").rstrip()
        if text.strip():
            self.blocks.append((self.heading, text if self.verbatim else text.strip()))

    def handle_starttag(self, tag, attributes):
        classes = (dict(attributes).get("class") or "").split()
        if self.skipped_tag:
            self.skipped_depth += tag == self.skipped_tag
        elif tag in self.SKIPPED or self.SKIPPED_CLASSES.intersection(classes):
            self.skipped_tag, self.skipped_depth = tag, 1
        elif tag in self.BLOCKS:
            self.close_block()
            self.verbatim += tag == "pre"
            self.heading = tag in ("h1", "h2", "h3", "h4")
        elif tag == "br":
            self.current.append("\n" if self.verbatim else " ")

    def handle_endtag(self, tag):
        if self.skipped_tag:
            self.skipped_depth -= tag == self.skipped_tag
            if self.skipped_depth == 0:
                self.skipped_tag = None
        elif tag in self.BLOCKS:
            self.close_block()
            self.verbatim = max(0, self.verbatim - (tag == "pre"))
            self.heading = False

    def handle_data(self, data):
        if not self.skipped_tag:
            self.current.append(data)


def joined(text):
    """Without the line breaks inside Chinese sentences, where a space would be a fault."""
    return re.sub(f"(?<=[{WIDE}])[ \\t]*\\n[ \\t]*(?=[{WIDE}])", "", text)


WIDE = "\u3000-\u303f\u3400-\u9fff\uff00-\uffef"


def from_html(data):
    """Blocks of a page: (is a heading, text)."""
    parser = Leaves()
    parser.feed(data.decode("utf-8", errors="strict"))
    parser.close()
    parser.close_block()
    return parser.blocks


ROFF_CHARACTERS = {
    "aq": "'", "dq": '"', "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "em": "—", "en": "–", "hy": "-", "bu": "•", "co": "©",
    "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "-": "-", "<=": "≤", ">=": "≥", "mu": "×", "ul": "_", "ba": "|", "or": "|",
}


def roff_inline(text):
    text = re.sub(r'\\".*', "", text)
    text = re.sub(r"\\f(\[[^]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\s[-+]?\d+", "", text)
    text = re.sub(r"\\\((..)", lambda m: ROFF_CHARACTERS.get(m[1], ""), text)
    text = re.sub(r"\\\[([^]]*)\]", lambda m: ROFF_CHARACTERS.get(m[1], ""), text)
    text = re.sub(r"\\\*(\(..|\[[^]]*\]|.)", "", text)
    text = re.sub(r"\\[vhwNZlLoDkb]'[^']*'", "", text)
    text = text.replace("\\e", "\\").replace("\\ ", " ").replace("\\~", " ").replace("\\0", " ")
    return re.sub(r"\\([-.'`\"])", r"\1", re.sub(r"\\[&|^%:/,cpt)]", "", text))


def roff_arguments(rest):
    return [a or b for a, b in re.findall(r'"((?:[^"]|"")*)"?|(\S+)', rest)]


def from_roff(data):
    """Blocks of a man page: (is a heading, text). Macros of man(7), and those of mdoc(7) as plain words."""
    blocks, lines, verbatim, skipping = [], [], False, False

    def end():
        text = "\n".join(lines).strip("\n")
        text = text if verbatim else joined(text).replace("\n", " ")
        lines.clear()
        if text.strip():
            blocks.append((False, text))

    for line in data.decode("utf-8", errors="strict").split("\n"):
        if skipping:
            skipping = not line.startswith("..")
            continue
        if not line.startswith((".", "'")):
            if line.strip() or verbatim:
                lines.append(roff_inline(line) if verbatim else roff_inline(line).strip())
            else:
                end()
            continue
        macro, _, rest = line[1:].strip().partition(" ")
        rest = re.sub(r'\\".*', "", rest).strip()
        words = [roff_inline(word) for word in roff_arguments(rest)]
        if macro in ("SH", "SS", "Sh", "Ss"):
            end()
            if words:
                blocks.append((True, " ".join(words)))
        elif macro in ("PP", "P", "LP", "TP", "IP", "HP", "Pp", "It", "sp", "br", "RS", "RE", "TQ"):
            if not (macro == "br" and verbatim):
                end()
            if macro in ("IP", "It") and words:
                lines.append(words[0])
        elif macro in ("nf", "EX", "Bd"):
            end()
            verbatim = True
        elif macro in ("fi", "EE", "Ed"):
            end()
            verbatim = False
        elif macro in ("BR", "BI", "IB", "IR", "RB", "RI", "SB"):
            lines.append("".join(words))
        elif macro in ("B", "I", "SM", "Nm", "Ar", "Fl", "Pa", "Xr", "Op", "Em", "Sy", "Li", "Dv", "Va", "Fn", "Ft", "Nd"):
            lines.append(" ".join(words))
        elif macro in ("de", "ig", "am"):
            skipping = True
        elif macro in ("TS",):
            skipping = False
    end()
    return blocks


def from_paragraphs(text):
    """Blocks of plain text or reStructuredText: a line that is underlined is a heading."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        block = block.strip("\n").rstrip()
        if block.strip() and not re.fullmatch(r"\.\. (SPDX|_|include::|contents::|toctree::)[^\n]*(\n\s[^\n]*)*", block):
            underlined = re.search(r"\n([=\-~^*#\"'.])\1{2,}$", block) is not None
            blocks.append((underlined and block.count("\n") <= 2, block))
    return blocks


# --- documents -------------------------------------------------------------------------------------------------------


def tidy(text):
    """Without terminal colours, control and private characters, and without people's addresses."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).replace("\r\n", "\n").replace("\u00a0", " ").replace("\u200b", "")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufeff\ue000-\uf8ff]", "", text)
    lines = []
    for line in text.split("\n"):
        if "Copyright" not in line:  # notices stay whole
            line = re.sub(r"\s*<[\w.+-]+@[\w-]+(\.[\w-]+)+>", "", line)
            line = re.sub(r"\b[\w.+-]+@[\w-]+(\.[\w-]+)+\b", "name@example.org", line)
        lines.append(line.rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def cut(blocks, separator="\n\n"):
    """Documents of about DOCUMENT_BYTES: cut before a heading where one comes late enough, else between blocks."""
    document, size = [], 0
    for heading, text in blocks:
        length = len(text.encode())
        if document and (size + length > DOCUMENT_BYTES or (heading and size > DOCUMENT_BYTES // 3)):
            yield separator.join(document)
            document, size = [], 0
        document.append(text)
        size += length
    if document:
        yield separator.join(document)


def pages(packages, package, folder, pattern, reader):
    for name, data in packages.files(package, folder, pattern):
        for part, text in enumerate(cut(reader(data))):
            yield f"{name}#{part}", text


def translated(reader):
    """`reader` without the long paragraphs that a translator has left in English; listings are kept."""

    def blocks(data):
        for heading, text in reader(data):
            if "\n" in text or len(text) < 60 or han(text) * 20 > len(text):
                yield heading, text

    return blocks


def markdown(data):
    return from_paragraphs(data.decode("utf-8", errors="replace"))


def kernel_text(data):
    """Only files that say themselves that they are under the GPL: others in the same folders are not."""
    text = data.decode("utf-8", errors="replace")
    licence = re.search(r"SPDX-License-Identifier: ([^\n]*)", text[:600])
    return from_paragraphs(text) if licence and re.search(r"\bGPL-2\.0", licence[1]) else []


HANDBOOK = "usr/share/doc/debian-handbook/html"
REFERENCE = "usr/share/debian-reference"
INSTALLATION = "usr/share/doc/installation-guide-amd64"
KERNEL = "usr/share/doc/linux-doc-6.1/Documentation"

BOTH_LICENCES = re.compile(r"# SPDX-License-Identifier: \(?GPL-2\.0[^\n]* or BSD-2-Clause", re.IGNORECASE)

# Works and authors of `fortunes-zh` that are centuries old; its modern quotations are left out of the sample.
CLASSICS = re.compile(
    "论语|菜根谭|增广贤文|道德经|詩經|诗经|荀子|孟子|庄子|辛弃疾|苏轼|李白|杜甫|李煜|温庭筠|白居易|柳永|晏殊|晏几道|李清照|张若虚|卓文君|佚名"
    "|张籍|范仲淹|李之仪|李商隐|元好问|王勃|纳兰|秦观|欧阳修|陆游|王维|孟浩然|杜牧|陶渊明|曹操|曹植|屈原|刘禹锡|柳宗元|韩愈|贺铸|周邦彦"
    "|姜夔|岳飞|文天祥|王安石|黄庭坚|马致远|关汉卿|李贺|岑参|高适|王昌龄|韦应物|孟郊|贾岛|元稹|苏洵|苏辙|诸葛亮|司马迁|宋　|\\[宋\\]|\\[唐\\]"
)


def fortunes(packages, classics):
    group, size, number = [], 0, 0
    for name, data in packages.files("fortunes-zh", "usr/share/games/fortunes", "tang300|song100|chinese"):
        entries = tidy(data.decode("utf-8")).split("\n%\n")
        for entry in entries + [None]:
            if entry is not None:
                if classics and name.endswith("chinese") and not CLASSICS.search(entry.strip().split("\n")[-1] + entry[:40]):
                    continue
                group.append(entry.strip("\n"))
                size += len(entry)
            if group and (size > 400 or entry is None):
                yield f"{name}#{number}", "\n\n".join(group)
                group, size, number = [], 0, number + 1


@domain("classic-zh", "zh", 260_000)
def classic_zh(packages):
    yield from fortunes(packages, classics=True)


@domain("book-zh", "zh", 900_000)
def book_zh(packages):
    yield from pages(packages, "debian-handbook", f"{HANDBOOK}/zh-CN", r"[^/]*\.html", translated(from_html))
    yield from pages(packages, "debian-reference-zh-cn", REFERENCE, r"ch\d+\.zh-cn\.html", translated(from_html))
    yield from pages(packages, "installation-guide-amd64", f"{INSTALLATION}/zh_CN", r"[^/]*\.html", translated(from_html))


@domain("book-en", "en", 900_000)
def book_en(packages):
    yield from pages(packages, "debian-handbook", f"{HANDBOOK}/en-US", r"[^/]*\.html", from_html)
    yield from pages(packages, "debian-reference-en", REFERENCE, r"ch\d+\.en\.html", from_html)
    yield from pages(packages, "installation-guide-amd64", f"{INSTALLATION}/en", r"[^/]*\.html", from_html)


@domain("help-zh", "zh", 700_000)
def help_zh(packages):
    folder = "usr/share/libreoffice/help/zh-CN/text"
    yield from pages(packages, "libreoffice-help-zh-cn", folder, r".*\.html", translated(from_html))


@domain("help-en", "en", 700_000)
def help_en(packages):
    folder = "usr/share/libreoffice/help/en-US/text"
    yield from pages(packages, "libreoffice-help-en-us", folder, r".*\.html", from_html)


@domain("manual-zh", "zh", 900_000)
def manual_zh(packages):
    yield from pages(packages, "manpages-zh", "usr/share/man/zh_CN", r".*\.gz", translated(from_roff))
    yield from pages(packages, "linux-doc-6.1", f"{KERNEL}/translations/zh_CN", r".*\.(rst|txt)\.gz", kernel_text)


@domain("manual-en", "en", 700_000)
def manual_en(packages):
    pattern = r"(?!translations/|devicetree/bindings/|ABI/|userspace-api/media/).*\.(rst|txt)\.gz"
    yield from pages(packages, "linux-doc-6.1", KERNEL, pattern, kernel_text)


@domain("knowledge-en", "en", 600_000)
def knowledge_en(packages):
    """GCIDE: dictionary entries in alphabetical order, neighbours together."""
    files = dict(packages.files("dict-gcide", "usr/share/dictd", r"gcide\.(dict\.dz|index)"))
    index = next(data for name, data in files.items() if name.endswith("index")).decode("utf-8")
    name, text = next((name, data) for name, data in files.items() if name.endswith("dz"))

    def number(word):
        return int.from_bytes(base64.b64decode("A" * (8 - len(word)) + word), "big")

    places = {(number(at), number(length)) for word, at, length in (r.split("\t") for r in index.splitlines()) if word[:3] != "00-"}
    group, size, first = [], 0, 0
    for at, length in sorted(places):
        entry = text[at : at + length].decode("utf-8", errors="replace").strip("\n")
        entry = re.sub(r"\n\s+\[[^\]\n]{0,30}(Webster|PJC|WordNet)[^\]\n]{0,30}\](?=\n|$)", "", entry)
        first = first if group else at
        group.append(re.sub(r"\n {3,}", "\n   ", entry))
        size += len(entry)
        if size > 1500:
            yield f"{name}#{first}", "\n\n".join(group)
            group, size = [], 0
    if group:
        yield f"{name}#{first}", "\n\n".join(group)


@domain("code", "code", 800_000)
def code(packages):
    """Device tree bindings with examples; only files that are also under the BSD-2-Clause licence, whole."""
    for name, data in packages.files("linux-doc-6.1", f"{KERNEL}/devicetree/bindings", r".*\.yaml\.gz"):
        text = data.decode("utf-8", errors="replace")
        if BOTH_LICENCES.match(text) and len(data) <= 3 * DOCUMENT_BYTES:
            yield name, text


@domain("quotation-zh", "zh", 0)
def quotation_zh(packages):
    yield from fortunes(packages, classics=False)


@domain("essay-en", "en", 0)
def essay_en(packages):
    folder = "usr/share/doc/anarchism/markdown"
    yield from pages(packages, "anarchism", folder, r".*\.md\.gz", markdown)


@domain("bindings", "code", 0)
def bindings(packages):
    """The device tree bindings that are under the GPL alone."""
    for name, data in packages.files("linux-doc-6.1", f"{KERNEL}/devicetree/bindings", r".*\.(yaml|txt)\.gz"):
        text = data.decode("utf-8", errors="replace")
        if not BOTH_LICENCES.match(text):
            yield name, text


# --- selection -------------------------------------------------------------------------------------------------------


class Seen:
    """What occurred before, anywhere in the corpus."""

    def __init__(self):
        self.lines, self.shingles = set(), set()

    @staticmethod
    def key(text):
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    def new_lines(self, text):
        """`text` without its lines of some length that occurred before."""
        kept = []
        for line in text.split("\n"):
            bare = re.sub(r"[\W\d_]+", "", line.lower())
            if len(bare) >= (8 if han(bare) > len(bare) // 2 else 14):
                key = self.key(bare)
                if key in self.lines:
                    continue
                self.lines.add(key)
            kept.append(line)
        return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")

    def mostly_seen(self, text):
        """Whether half of the text's shingles (an eighth of them, by their hash) occurred before; remembers them."""
        bare = re.sub(r"\s+", "", text)
        keys = set()
        for at in range(max(1, len(bare) - SHINGLE_CHARS + 1)):
            value = hash_of(bare[at : at + SHINGLE_CHARS])
            if value % 8 == 0:
                keys.add(value)
        seen = len(keys & self.shingles)
        if keys and seen > SHINGLE_SEEN_MAX * len(keys):
            return True
        self.shingles |= keys
        return False


def hash_of(text):
    # Not hash(): it differs from process to process.
    data = text.encode()
    return zlib.crc32(data) << 32 | zlib.adler32(data)


def han(text):
    return len(re.findall(r"[\u3400-\u9fff]", text))


def documents(language, reader, packages, seen, counts):
    for source, text in reader(packages):
        text = tidy(text)
        if language != "code":
            text = seen.new_lines(text)
        letters = len(re.sub(r"\s+", "", text))
        if letters < (DOCUMENT_CHARS_MIN if language != "zh" else DOCUMENT_CHARS_MIN // 2):
            counts["short"] += 1
        elif language == "zh" and han(text) < HAN_MIN * letters:
            counts["not Chinese"] += 1
        elif seen.mostly_seen(text):
            counts["seen before"] += 1
        else:
            yield {"text": text, "source": source}


def sample(found, budget):
    """Documents by their hash until the budget is spent, in their own order."""
    order = sorted(range(len(found)), key=lambda i: hashlib.sha256(found[i]["text"].encode()).digest())
    chosen, size = [], 0
    for i in order:
        if size >= budget:
            break
        chosen.append(i)
        size += len(found[i]["text"].encode())
    return [found[i] for i in sorted(chosen)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--full", metavar="DIR", nargs="?", const=os.path.join(HERE, "full"),
        help="write everything instead of the sample, into DIR (default: full/ beside this script)",
    )
    parser.add_argument("--out", metavar="DIR", default=HERE, help="where the sample goes (default: beside this script)")
    arguments = parser.parse_args()
    out = arguments.full or arguments.out
    os.makedirs(out, exist_ok=True)
    seen, provenance = Seen(), []
    with tempfile.TemporaryDirectory() as folder:
        packages = Packages(folder, pinned())
        for name, (language, budget, reader) in DOMAINS.items():
            if not arguments.full and budget == 0:
                continue
            counts = {"short": 0, "not Chinese": 0, "seen before": 0}
            found = list(documents(language, reader, packages, seen, counts))
            if not arguments.full:
                found = sample(found, budget)
            data = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in found).encode()
            path = os.path.join(out, f"{name}.jsonl")
            with open(path + ".partial", "wb") as file:
                file.write(data)
            os.replace(path + ".partial", path)
            size = sum(len(document["text"].encode()) for document in found)
            used = sorted({document["source"].split(":")[0] for document in found})
            provenance.append({
                "file": f"{name}.jsonl", "sha256": hashlib.sha256(data).hexdigest(), "language": language,
                "documents": len(found), "text_bytes": size,
                "packages": [packages.known[package][1] | licence(name, package) for package in used],
            })
            print(f"{name}: {len(found)} documents, {size / 1e6:.2f} MB; left out: {counts}", file=sys.stderr)
    with open(os.path.join(out, "PROVENANCE.json"), "w", encoding="utf-8") as file:
        json.dump(provenance, file, indent=1, ensure_ascii=False)
        file.write("\n")
    if os.path.realpath(out) != os.path.realpath(HERE):
        shutil.copy(os.path.join(HERE, "README.md"), out)
        shutil.copytree(os.path.join(HERE, "licences"), os.path.join(out, "licences"), dirs_exist_ok=True)


if __name__ == "__main__":
    main()
