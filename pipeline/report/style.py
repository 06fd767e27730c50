"""The report's style sheet: one column of text, light and dark by the reader's setting, fit to print."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --raised: #f6f7f8; --ink: #1c2024; --soft: #60676f; --rule: #dfe2e5; --grid: #e9ebed;
  --accent: #0b62b0; --muted: #b9c2ca; --good: #1a7f4e; --bad: #b3541e;
  --s0: #0b62b0; --s1: #c4570c; --s2: #15805d; --s3: #a23b7f; --s4: #7a6a00; --s5: #4b5158;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --raised: #1d2125; --ink: #e5e8ea; --soft: #9aa3ab; --rule: #32383d; --grid: #272c30;
    --accent: #6db3f2; --muted: #525b63; --good: #5fc795; --bad: #e89a6b;
    --s0: #6db3f2; --s1: #f0975a; --s2: #5fc79d; --s3: #df8fc4; --s4: #d3c255; --s5: #b3bac0;
  }
}
* { box-sizing: border-box; }
html { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
       color: var(--ink); background: var(--paper); -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 66rem; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 .4rem; font-weight: 650; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 3.2rem 0 .3rem; padding-top: 1.1rem; font-weight: 650;
     border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; font-weight: 600; }
p { margin: .3rem 0 .9rem; max-width: 46rem; }
.lead { font-size: 1.05rem; }
.soft, footer, figcaption, .note { color: var(--soft); }
.note, figcaption, footer { font-size: .85rem; }
code, .hash { font: .84em ui-monospace, "SF Mono", "Cascadia Mono", "DejaVu Sans Mono", monospace;
              overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .9rem; margin: 1.2rem 0 0; }
nav a { white-space: nowrap; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .4rem; }
th, td { padding: .42rem .8rem .42rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
thead th { font-weight: 500; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 11rem; }
td.num, th.num { text-align: right; white-space: nowrap; }
td:last-child, th:last-child { padding-right: 0; }
td.result { font-weight: 650; }
td .note, th .note { display: block; font-weight: 400; max-width: 24rem; }
.missing { color: var(--bad); font-size: .85rem; white-space: normal; }
.state-done { color: var(--good); } .state-failed { color: var(--bad); }
figure { margin: 1rem 0 1.4rem; }
figcaption { margin-bottom: .35rem; }
figcaption strong { color: var(--ink); font-weight: 600; }
.pair { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: .4rem 2.2rem; }
.triple { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); gap: .4rem 1.6rem; }
.pair figure, .triple figure { margin: .7rem 0; min-width: 0; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; list-style: none; padding: 0; margin: .2rem 0 .3rem;
          font-size: .85rem; }
.legend i { display: inline-block; width: 1.1rem; height: 0; border-width: 3px 0 0; border-style: solid;
            margin-right: .4rem; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; font: 12px/1 system-ui, -apple-system, "Segoe UI", Roboto,
      "Noto Sans", "Liberation Sans", sans-serif; }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .label { fill: var(--ink); } svg .strong { font-weight: 650; }
svg .middle { text-anchor: middle; } svg .end { text-anchor: end; }
svg .grid { stroke: var(--grid); } svg .baseline { stroke: var(--soft); }
svg .outline { fill: none; stroke: var(--rule); }
svg .bar { fill: var(--muted); } svg .bar.main { fill: var(--accent); }
svg .whisker { fill: none; stroke: var(--ink); stroke-width: 1.3; }
svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
svg .cell { stroke: var(--paper); stroke-width: 1; }
svg .right { fill: var(--accent); } svg .wrong { fill: var(--bad); }
svg .count { fill: var(--ink); font-size: 11px; }
.s0 { stroke: var(--s0); border-color: var(--s0); } .s1 { stroke: var(--s1); border-color: var(--s1); }
.s2 { stroke: var(--s2); border-color: var(--s2); } .s3 { stroke: var(--s3); border-color: var(--s3); }
.s4 { stroke: var(--s4); border-color: var(--s4); } .s5 { stroke: var(--s5); border-color: var(--s5); }
svg polyline.s1 { stroke-dasharray: 7 3; } svg polyline.s2 { stroke-dasharray: 2 3; }
svg polyline.s3 { stroke-dasharray: 9 3 2 3; } svg polyline.s4 { stroke-dasharray: 4 2; }
svg polyline.faint { stroke-width: 1; stroke-opacity: .35; stroke-dasharray: none; }
svg .dot { fill: var(--paper); stroke-width: 2; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(25rem, 100%), 1fr)); gap: 1rem 2rem; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.panels { display: flex; gap: .5rem; }
.panels > div { flex: 1 1 0; min-width: 0; max-width: 12rem; text-align: center; font-size: .8rem;
                color: var(--soft); }
.panels img { width: 100%; height: auto; display: block; border-radius: 3px; background: var(--raised); }
.panels img.small { image-rendering: pixelated; }
.pictures figure, .thumbs figure { margin: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .22rem 1.2rem; font-size: .88rem;
     margin: .3rem 0 1rem; }
dt { color: var(--soft); } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
details { margin: .6rem 0; } summary { cursor: pointer; font-size: .92rem; color: var(--accent); }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media (max-width: 40rem) { body { padding: 1.6rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
@media print {
  :root { --paper: #fff; --raised: #f6f7f8; --ink: #000; --soft: #444; --rule: #bbb; --grid: #ddd; --accent: #0b4f8f;
          --muted: #b4bcc3; --good: #14603c; --bad: #8f4318; }
  html { font-size: 12px; } body { max-width: none; padding: 0; } nav { display: none; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .cell, .bar, .panels img { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  @page { margin: 16mm; }
}
"""
