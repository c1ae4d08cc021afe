"""Which format a file is in, by its first bytes; its name says nothing."""

from __future__ import annotations

HEAD = 4096  # bytes that tell
HEIF_BRANDS = {
    b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1",
    b"mif2", b"mif3", b"miaf", b"heif",
}  # fmt: skip
AVIF_BRANDS = {b"avif", b"avis"}
VIDEO, PICTURE = "take a frame of it", "convert it to PNG"
# (offset, bytes, what such a file is, what to do): of files that people take for pictures.
OTHERS = (
    (0, b"%PDF-", "a PDF document", "save the page as PNG"),
    (0, b"%!PS", "a PostScript program", "save the page as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript program", "save the page as PNG"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", VIDEO),
    (8, b"AVI ", "a video (AVI)", VIDEO),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)", VIDEO),
    (0, b"\x00\x00\x01\xb3", "a video (MPEG)", VIDEO),
    (0, b"FLV\x01", "a video (Flash)", VIDEO),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (Windows Media)", VIDEO),
    (0, b"OggS", "a video or sound (Ogg)", VIDEO),
    (4, b"moov", "a video (QuickTime)", VIDEO),
    (4, b"mdat", "a video (QuickTime)", VIDEO),
    (0, b"\xff\x0a", "a JPEG XL image", PICTURE),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "a JPEG XL image", PICTURE),
    (0, b"8BPS", "a Photoshop document", PICTURE),
    (0, b"gimp xcf", "a GIMP document", PICTURE),
    (0, b"\x00\x00\x01\x00", "an icon (ICO)", PICTURE),
    (0, b"icns", "an icon (ICNS)", PICTURE),
    (0, b"qoif", "a QOI image", PICTURE),
    (0, b"DDS ", "a DirectDraw surface", PICTURE),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image", PICTURE),
    (0, b"\x93NUMPY", "a numpy array", "give numpy.load's array in place of the file"),
    (0, b"PK\x03\x04", "a ZIP archive", "unpack it"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"version https://git-lfs", "a Git LFS pointer", "get the file with `git lfs pull`"),
)


def brand_of(head: bytes) -> str | None:
    """AVIF, HEIC, or None: of what shares MPEG-4's container, by its brands."""
    if head[4:8] != b"ftyp":
        return None
    end = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[i : i + 4] for i in range(16, min(end, len(head)), 4))]
    if brands[0] in AVIF_BRANDS or (brands[0] in HEIF_BRANDS and AVIF_BRANDS & set(brands)):
        return "AVIF"
    return "HEIC" if brands[0] in HEIF_BRANDS else None


def other_kind(head: bytes) -> tuple[str, str] | None:
    """Of a file in no format for us: what it is, and what to do; None where we don't know it."""
    if head[4:8] == b"ftyp":
        if head[8:11] == b"crx":
            return "a raw photo (CR3)", "convert it to JPEG"
        return "a video (MP4 or QuickTime)", VIDEO
    for offset, magic, kind, fix in OTHERS:
        if head.startswith(magic, offset):
            return kind, fix
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page", "save the picture itself"
    if text.startswith(b"<svg") or (text.startswith(b"<") and b"<svg" in text):
        return "an SVG drawing", "save it as PNG, large enough to see everything"
    return None
