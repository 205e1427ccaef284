"""Texts that a model, or someone who attacks its readers, might write. Shown as written, each must look exactly so."""

EVIL = "http://evil.example"

COMMON = [
    '<img src=x onerror="window.pwned=1">',
    "${window.pwned=2} {{constructor}} \\ `${HOME}`",
    "</script><script>window.pwned=3</script>",
    f"[click](javascript:window.pwned=4) ![x]({EVIL}/t.png)",
    "{{#each value}}{{this}}{{/each}} {{{raw}}} ${value} ${`${window.pwned=5}`} `);window.pwned=5;(`",
    f"<svg onload='window.pwned=6'><image href='{EVIL}/a.svg'/></svg>",
    f"<style>@import url({EVIL}/a.css); body {{ display: none }}</style>",
    f"<iframe src='{EVIL}'></iframe><object data='{EVIL}'></object><embed src='{EVIL}'>",
    f"![a][ref]\n\n[ref]: {EVIL}/ref.png",
    f"[![inside a link]({EVIL}/in.png)]({EVIL})",
    f"\\`![not code]({EVIL}/escaped.png)\\` and `` ![code]({EVIL}/c.png) ``",
    f"\\`<img src='{EVIL}/escaped2.png' onerror='window.pwned=7'>\\`",
    '[data](data:text/html,<script>window.pwned=8</script>) <a href="data:text/html;base64,PHNjcmlwdD4=">x</a>',
    "\u202egnirts desrever\u202c \u2066isolated\u2069 \u200f\u061c right",
    "\ufdd0img src=x onerror=window.pwned=9> \ufdd1lt; \ufdd3mark\ufdd3 \ufdd4x\ufdd5",
    "<!-- a comment --> <![CDATA[ data ]]> <?php echo 1 ?> <!DOCTYPE html>",
    "```html\n<script>window.pwned=10</script>\n```\n~~~\n</pre><img src=x onerror=window.pwned=10>\n~~~",
    "````\nnested ``` fences\n```\nnever closed <b>",
    f"$\\href{{javascript:window.pwned=11}}{{click}}$ $$\\includegraphics{{{EVIL}/tex.png}}$$ \\(\\url{{{EVIL}}}\\)",
    "$\\htmlId{x}{y}$ $\\class{a}{b}$ $\\style{position:fixed}{b}$ $$\\rule{9999em}{9999em}$$ $\\kern-9999em x$",
    "$\\def\\a{\\a\\a}\\a$ $\\frac{1}{$ %%%LATEX_BLOCK_0%%% %%%LATEX_BLOCK_7%%% from $5 to $6",
    f'```mermaid\ngraph TD; A-->B; click A "{EVIL}"; style A fill:url({EVIL}/m.png)\n```',
    "null\0byte, bell\x07, escape \x1b[31m, \r\ncarriage\rreturns\ttabs, vertical\x0b, form\x0c, nel\x85",
    "zero\u200bwidth\u200d \U0001f468\u200d\U0001f469\u200d\U0001f467 \u00ad soft \ufeff bom, z\u0351\u036ba\u0316lgo",
    "word " * 5 + "averyveryverylongword" * 30,
    "x" * 100_000,
    "&lt;script&gt; &amp;amp; &#60;b&#62; &nbsp; &copy;",
    "<a href='java\nscript:window.pwned=12' onmouseover=window.pwned=12 style='position:fixed;inset:0'>all</a>",
    "    indented\n\tcode <i>\n\n  \n trailing spaces   \n\n\n",
    f"www.evil.example {EVIL}/auto <{EVIL}/angle> me@evil.example xmpp:a@evil.example",
]

OWN = [
    "- " * 500 + "deep",
    ">" * 5000 + " quoted so deeply that a parser may give up",
    "[" * 3000 + "]" * 3000,
    "*a_" * 3000,
    "<form action='"
    + EVIL
    + "'><input name=q autofocus onfocus=window.pwned=13><button>Submit ranking</button></form>",
    "<dialog open>Your session has ended. <a href='/logout'>Log in</a></dialog><base href='" + EVIL + "/'>",
    "<div id='wire' class='submit' data-screen='finished'></div><p hidden>\ufdd30123456789abcdef\ufdd3</p>",
    "| a | b |\n|---|---|\n| `<img src=x onerror=window.pwned=14>` | ![t]("
    + EVIL
    + "/table.png) |\n\n[^1]: note "
    + EVIL,
    '__proto__ constructor [object Object] undefined null NaN {"key": "value", "id": 1}',
    "\u2028line\u2029paragraph </textarea></title><math><mi//xlink:href='data:x,<script>window.pwned=15</script>'>",
]

HOSTILE = [*COMMON, *OWN]
