"""Contrast of what a page shows, as WCAG 2.2 reckons it.

found, named = page.evaluate(SEEN)      # [[text, colour, ground], ...], {variable: colour}
contrast(colour, ground)                # 1 to 21; AA asks for 4.5 for text and 3 for what shows a state or a border
"""

from __future__ import annotations

Colour = tuple[float, float, float]

# Every piece of text that is seen, with its colour and that of what it stands on; then the variables used for what is not text.
SEEN = """() => {
    const rgb = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const ground = (at) => { const own = rgb(getComputedStyle(at).backgroundColor); return own[3] === 0 ? ground(at.parentElement) : own; };
    const found = [[document.querySelector("#text").placeholder, rgb(getComputedStyle(document.querySelector("#text"), "::placeholder").color), ground(document.querySelector("#text"))]];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const at = walker.currentNode.parentElement;
        if (walker.currentNode.data.trim() && at.checkVisibility() && at.tagName !== "SCRIPT") found.push([walker.currentNode.data, rgb(getComputedStyle(at).color), ground(at)]);
    }
    const probe = document.body.appendChild(document.createElement("i"));
    const variable = (name) => { probe.style.color = `var(--${name})`; return rgb(getComputedStyle(probe).color); };
    const named = Object.fromEntries(["page", "card", "edge", "accent", "rest", "good", "bad", "ink"].map((name) => [name, variable(name)]));
    probe.remove();
    return [found, named]; }"""


def luminance(colour: Colour) -> float:
    """Relative luminance of 8-bit sRGB: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in colour[:3]))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: Colour, other: Colour) -> float:
    """1 (none) to 21: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
