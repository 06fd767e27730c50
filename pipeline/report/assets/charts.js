/* Draws the report's charts with uPlot: their values at the pointer, zooming by dragging, runs hidden by the legend.

   A chart is <figure class="chart">: its data as JSON, and <div class="plot">, in which it is drawn as soon as it has a
   size. The charts of one <div class="stage"> show the same stretch and the same runs. Texts are set as textContent. */
"use strict";
(() => {
  const NUM_COLOURS = 6; // --s0 ... --s5 in the style sheet
  const DASHES = [[], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], []]; // told apart in print and without colours
  const FONT = '12px system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif';
  const MAX_TIP_LINES = 12;
  const root = document.documentElement;
  const charts = new Map(); // element .plot -> uPlot

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colourOf = (place) => colour(`--s${place % NUM_COLOURS}`);

  function number(value, percent) {
    if (percent) return `${Number((100 * value).toPrecision(4))}%`;
    const size = Math.abs(value);
    if (size && (size < 1e-4 || size >= 1e6)) return value.toExponential(3).replace(/\.?0+e/, "e").replace("e+", "e");
    return Number(value.toPrecision(4)).toLocaleString("en", { maximumFractionDigits: 10 });
  }

  function short(value) {
    for (const [factor, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
      if (Math.abs(value) >= factor) return `${Number((value / factor).toPrecision(4))}${unit}`;
    return String(Number(value.toPrecision(4)));
  }

  /* A range that isn't a single point. */
  const spread = (low, high) =>
    high > low ? [low, high] : [low - (Math.abs(low) * 0.5 || 0.5), high + (Math.abs(high) * 0.5 || 0.5)];

  function options(plot, spec, whole) {
    const axis = { stroke: () => colour("--soft"), font: FONT, labelFont: FONT, labelSize: 18, labelGap: 2,
                   ticks: { stroke: () => colour("--grid"), size: 4 } };
    const series = spec.series.map(({ label, place, dots, x }) => ({
      label, spanGaps: true, width: 1.8, stroke: () => colourOf(place), dash: DASHES[place % NUM_COLOURS],
      points: { show: dots || x.length === 1, size: 7, width: 2, stroke: () => colourOf(place),
                fill: () => colour("--paper") },
    }));
    return {
      width: plot.clientWidth, height: plot.clientHeight, legend: { show: false }, padding: [8, 12, 0, 0],
      series: [{}, ...series],
      scales: {
        x: { time: false, range: (_, low, high) => spread(low, high) },
        y: { range: (_, low, high) => {
          if (low == null) return [0, 1];
          const [bottom, top] = uPlot.rangeNum(...spread(low, high), 0.06, true);
          return [low >= 0 && (spec.zero || bottom < 0) ? 0 : bottom, top];
        } },
      },
      axes: [
        { ...axis, label: "samples", size: 28, grid: { show: false }, space: 56, values: (_, ticks) => ticks.map(short) },
        { ...axis, label: spec.y, grid: { stroke: () => colour("--grid"), width: 1 }, space: 36,
          values: (_, ticks) => ticks.map((tick) => number(tick, spec.percent)),
          size: (_, texts) => 16 + 6.5 * Math.max(3, ...(texts || []).map((text) => text.length)) },
      ],
      cursor: { y: false, drag: { x: true, y: false, dist: 4 },
                points: { size: 9, width: 2, stroke: () => colour("--paper"),
                          fill: (chart, i) => colourOf(spec.series[i - 1].place) },
                sync: { key: stageOf(plot).id, scales: ["x", null],
                        filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } } },
      hooks: {
        setCursor: [(chart) => showTip(plot, chart, spec)],
        setScale: [(chart, key) => key === "x" && zoomed(plot, chart, whole)],
      },
    };
  }

  const stageOf = (plot) => plot.closest(".stage");
  const neighbours = (plot) => [...stageOf(plot).querySelectorAll(".plot")].filter((other) => charts.has(other));

  function draw(plot) {
    const spec = JSON.parse(plot.parentElement.querySelector("script").textContent);
    const data = uPlot.join(spec.series.map(({ x, y }) => [x, y]));
    const whole = spread(data[0][0], data[0].at(-1));
    const chart = new uPlot(options(plot, spec, whole), data, plot);
    charts.set(plot, chart);
    chart.whole = whole;
    chart.places = spec.series.map(({ place }) => place);
    chart.tip = add(plot.parentElement, "div", "tip");
    chart.tip.setAttribute("role", "status");
    chart.tip.hidden = true;
    chart.all = add(plot.parentElement, "button", "all", "Show all");
    chart.all.type = "button";
    chart.all.hidden = true;
    chart.all.addEventListener("click", () => zoom(plot, null));
    plot.addEventListener("keydown", (event) => keyPressed(event, plot, chart));
    plot.addEventListener("blur", () => chart.setCursor({ left: -10, top: -10 }));
    /* One that was inside a closed <details> until now joins the others. */
    for (const button of stageOf(plot).querySelectorAll('.legend [aria-pressed="false"]')) showRuns(chart, button);
    const other = neighbours(plot).map((neighbour) => charts.get(neighbour)).find(({ all }) => !all.hidden);
    if (other) chart.setScale("x", { min: other.scales.x.min, max: other.scales.x.max });
  }

  function add(parent, name, kind, text = "") {
    const element = document.createElement(name);
    element.className = kind;
    element.textContent = text;
    parent.append(element);
    return element;
  }

  /* The values at the pointer, largest first; those of runs that aren't there at these samples are left out. */
  function showTip(plot, chart, spec) {
    const { tip, cursor } = chart;
    if (!tip) return;
    const at = chart.data[0][cursor.idx];
    tip.hidden = cursor.left < 0 || at === undefined || !(plot.matches(":hover") || document.activeElement === plot);
    if (tip.hidden) return;
    const lines = spec.series
      .map(({ label, place, x }, i) => ({ label, place, y: chart.data[i + 1][cursor.idxs[i + 1]],
                                          there: chart.series[i + 1].show && x[0] <= at && at <= x.at(-1) }))
      .filter(({ y, there }) => there && y != null)
      .sort((a, b) => b.y - a.y);
    const distances = lines.map(({ y }) => Math.abs(chart.valToPos(y, "y") - cursor.top));
    const nearest = distances.indexOf(Math.min(...distances));
    tip.replaceChildren();
    add(tip, "p", "", `${Math.round(at).toLocaleString("en")} samples`);
    for (const [i, { label, place, y }] of lines.slice(0, MAX_TIP_LINES).entries()) {
      const line = add(tip, "div", i === nearest && lines.length > 1 ? "near" : "");
      add(line, "i", `s${place % NUM_COLOURS}`);
      add(line, "span", "", label);
      add(line, "b", "", number(y, spec.percent));
    }
    if (lines.length > MAX_TIP_LINES) add(tip, "p", "", `and ${lines.length - MAX_TIP_LINES} more`);
    moveTip(tip, plot, chart);
  }

  /* Beside the pointer, on the side that has room. */
  function moveTip(tip, plot, chart) {
    const left = plot.offsetLeft + chart.over.offsetLeft + chart.cursor.left;
    const fits = left + 14 + tip.offsetWidth <= plot.parentElement.clientWidth;
    tip.style.left = `${Math.max(0, fits ? left + 14 : left - 14 - tip.offsetWidth)}px`;
    tip.style.top = `${plot.offsetTop + chart.over.offsetTop + 6}px`;
  }

  /* Shows the stretch [low, high] of samples in every chart of the stage; null shows all. */
  function zoom(plot, stretch) {
    for (const other of neighbours(plot)) {
      const chart = charts.get(other);
      const [min, max] = stretch || chart.whole;
      if (chart.scales.x.min !== min || chart.scales.x.max !== max) chart.setScale("x", { min, max });
    }
  }

  function zoomed(plot, chart, [low, high]) {
    const { min, max } = chart.scales.x;
    const isWhole = min === low && max === high;
    if (chart.all) {
      chart.all.hidden = isWhole;
      if (plot.matches(":hover") || document.activeElement === plot) zoom(plot, isWhole ? null : [min, max]);
    }
  }

  function keyPressed(event, plot, chart) {
    const xs = chart.data[0];
    const { min, max } = chart.scales.x;
    const at = chart.cursor.left >= 0 ? xs[chart.cursor.idx] : null;
    const middle = at ?? (min + max) / 2;
    const resize = (factor) => {
      const [low, high] = chart.whole;
      const stretch = [Math.max(low, middle + (min - middle) * factor), Math.min(high, middle + (max - middle) * factor)];
      zoom(plot, stretch[0] === low && stretch[1] === high ? null : stretch);
    };
    const move = (step) => {
      const shown = xs.filter((x) => min <= x && x <= max);
      if (!shown.length) return;
      const next = at === null ? (step > 0 ? 0 : shown.length - 1) : shown.indexOf(at) + step;
      const x = shown[Math.min(shown.length - 1, Math.max(0, next))];
      chart.setCursor({ left: chart.valToPos(x, "x"), top: chart.over.clientHeight / 2 });
    };
    const actions = {
      ArrowRight: () => move(event.shiftKey ? 10 : 1), ArrowLeft: () => move(event.shiftKey ? -10 : -1),
      "+": () => resize(0.5), "=": () => resize(0.5), "-": () => resize(2),
      Escape: () => { zoom(plot, null); chart.setCursor({ left: -10, top: -10 }); },
    };
    if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  function showRuns(chart, button) {
    const show = button.getAttribute("aria-pressed") === "true";
    chart.places.forEach((place, i) => {
      if (place === Number(button.dataset.place)) chart.setSeries(i + 1, { show });
    });
  }

  function redraw() {
    for (const chart of charts.values()) chart.redraw(false, true);
  }

  root.classList.add("scripted");
  const resized = new ResizeObserver((entries) => {
    for (const { target, contentRect: { width, height } } of entries) {
      if (!width || !height) continue; // inside a closed <details>
      if (charts.has(target)) charts.get(target).setSize({ width, height });
      else draw(target);
    }
  });
  for (const [number, stage] of document.querySelectorAll(".stage").entries()) {
    stage.id = `stage-${number}`;
    for (const button of stage.querySelectorAll(".legend button")) {
      button.disabled = false;
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
        for (const plot of stage.querySelectorAll(".plot")) if (charts.has(plot)) showRuns(charts.get(plot), button);
      });
    }
    for (const plot of stage.querySelectorAll(".plot")) resized.observe(plot);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  /* Paper is light and narrow: the style sheet keeps to its light colours while the page is printing. */
  addEventListener("beforeprint", () => {
    resized.disconnect();
    root.classList.add("printing");
    for (const [plot, chart] of charts)
      chart.setSize(plot.closest(".small") ? { width: 225, height: 160 } : { width: 330, height: 210 });
    redraw();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("printing");
    for (const plot of document.querySelectorAll(".plot")) resized.observe(plot); // which sets the sizes anew
    redraw();
  });
})();
