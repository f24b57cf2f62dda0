// The results explorer: filters the table, and shows the curves and facts of the selected results.
// The address says what is shown: #sac_pendulum,td3_pendulum or #algo=sac&env=Pendulum-v1&verdict=passed&show=sac_pendulum.
(() => {
  const root = document.getElementById("results-explorer");
  const results = new Map(window.levinResults.map((result) => [result.name, result]));
  const find = (selector) => root.querySelector(selector);
  const rows = [...root.querySelectorAll("tbody tr")];
  const filters = [...root.querySelectorAll(".filters select")];
  const COLORS = ["#2f7ed8", "#e0722f", "#2ca36b", "#c2479a", "#8a63d2", "#b8912a", "#3aa6b9", "#d14b4b"];
  let selected = [];
  let kind = ""; // kind of curve that the reader chose; empty: the one that the score is measured by

  // --- address

  function readAddress() {
    const hash = decodeURIComponent(location.hash.slice(1));
    const choices = new URLSearchParams(hash.includes("=") ? hash : `show=${hash}`);
    for (const filter of filters) {
      const wanted = (choices.get(filter.name) || "").toLowerCase();
      const option = [...filter.options].find((each) => each.value.toLowerCase() === wanted);
      filter.value = option ? option.value : "";
    }
    selected = (choices.get("show") || "").split(",").filter((name) => results.has(name));
  }

  function writeAddress() {
    const parts = filters.filter((filter) => filter.value).map((each) => `${each.name}=${encodeURIComponent(each.value)}`);
    const names = selected.join(",");
    const hash = parts.length ? [...parts, `show=${names}`].join("&") : names;
    history.replaceState(null, "", `#${hash}`);
  }

  // --- table

  const isShown = (row) => filters.every((filter) => !filter.value || row.dataset[filter.name] === filter.value);

  function showRows() {
    for (const row of rows) {
      row.hidden = !isShown(row);
      row.classList.toggle("selected", selected.includes(row.dataset.name));
      row.querySelector("input").checked = selected.includes(row.dataset.name);
    }
    const count = rows.filter((row) => !row.hidden).length;
    find(".count").textContent = count ? `${count} of ${rows.length} results` : "No result has all three.";
    find(".reset").hidden = filters.every((filter) => !filter.value);
  }

  // Keep the selected rows that the filters show; else select the first shown row that has curves.
  function keepShown() {
    const shown = rows.filter(isShown).map((row) => row.dataset.name);
    selected = selected.filter((name) => shown.includes(name));
    if (!selected.length) {
      selected = [shown.find((name) => Object.keys(results.get(name).curves).length) || shown[0]].filter(Boolean);
    }
  }

  // --- chart

  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const fade = (color, alpha) => color + Math.round(alpha * 255).toString(16).padStart(2, "0");

  function traces(result, own, color, alone) {
    const curves = result.curves[own];
    if (!curves) return [];
    const seeds = Object.entries(curves.seeds);
    const mode = seeds[0][1][0].length > 1 ? "lines" : "markers";
    const each = seeds.map(([seed, [x, y]]) => ({
      x, y, mode, type: "scatter", name: `seed ${seed}`, meta: "seed", legendgroup: result.name, showlegend: false,
      line: { color: fade(color, alone ? 0.55 : 0.4), width: 1.2 }, marker: { color },
      hovertemplate: `${alone ? "" : `${result.title}, `}seed ${seed}<br>%{x:,} env steps: %{y:.1f}<extra></extra>`,
    }));
    const [x, y] = curves.mean;
    const name = alone ? `mean of ${seeds.length} seed${seeds.length > 1 ? "s" : ""}` : result.title;
    const mean = {
      x, y, mode, name, type: "scatter", meta: "mean", legendgroup: result.name, line: { color, width: 3 },
      marker: { color }, hovertemplate: `${name}<br>%{x:,} env steps: %{y:.1f}<extra></extra>`,
    };
    return [...each, mean];
  }

  // Curves of the source's own code, and its published numbers at the env steps they were measured at.
  function sourceTraces(result, own) {
    const grey = css("--color-foreground-secondary");
    const list = [];
    if (result.source && own === result.kind) {
      Object.values(result.source.curves).forEach(([x, y], i) => list.push({
        x, y, mode: "lines", type: "scatter", meta: "source", legendgroup: "source", showlegend: i === 0,
        name: `${result.source.family}, run here`, line: { color: grey, width: 1, dash: "dot" },
        hovertemplate: `${result.source.family}<br>%{x:,} env steps: %{y:.1f}<extra></extra>`,
      }));
    }
    if (own === result.kind) result.published.forEach((published, i) => list.push({
      x: [result.envSteps], y: [published.mean], mode: "markers", type: "scatter", meta: "published",
      name: `${published.family}: ${published.number}`, cliponaxis: false,
      marker: { symbol: ["circle", "diamond", "square", "cross"][i % 4], size: 9, color: css("--color-foreground-primary") },
      error_y: { type: "data", array: [published.std || 0], visible: published.std !== null, thickness: 1.5 },
      hovertemplate: `${published.label}<br>${published.number}<extra></extra>`,
    }));
    return list;
  }

  // Required score of a result as a line; alone, also its published number, with one standard deviation as a band.
  function marks(result, color, alone) {
    const across = { xref: "paper", x0: 0, x1: 1, layer: "below" };
    const shapes = [{ ...across, type: "line", y0: result.gate, y1: result.gate, line: { color, width: 1.5, dash: "dot" } }];
    const label = (y, text, side) => ({
      xref: "paper", x: 0.005, xanchor: "left", y, yanchor: side, text, showarrow: false,
      font: { size: 11, color: css("--color-foreground-secondary") }, bgcolor: css("--color-background-primary"),
      borderpad: 1, opacity: 0.85,
    });
    const first = result.published[0];
    const above = !first || result.gate > first.mean;
    const notes = alone ? [label(result.gate, `required: ${result.gate}`, above ? "bottom" : "top")] : [];
    if (alone && first) {
      const band = { ...across, y0: first.mean - (first.std || 0), y1: first.mean + (first.std || 0) };
      const grey = css("--color-foreground-primary");
      if (first.std) shapes.push({ ...band, type: "rect", fillcolor: grey, opacity: 0.09, line: { width: 0 } });
      shapes.push({ ...across, type: "line", y0: first.mean, y1: first.mean, line: { color: grey, width: 1, dash: "dash" } });
      notes.push(label(first.mean, `published: ${first.number}`, above ? "top" : "bottom"));
    }
    return [shapes, notes];
  }

  function draw() {
    const chosen = selected.map((name) => results.get(name));
    const alone = chosen.length === 1;
    const own = (result) => (kind && result.curves[kind] ? kind : result.kind);
    const data = [];
    const shapes = [];
    const annotations = [];
    chosen.forEach((result, i) => {
      const color = COLORS[i % COLORS.length];
      data.push(...traces(result, own(result), color, alone));
      if (alone) data.push(...sourceTraces(result, own(result)));
      if (own(result) !== result.kind) return; // the numbers below are of the other kind of curve
      const [lines, notes] = marks(result, alone ? css("--color-foreground-secondary") : color, alone);
      shapes.push(...lines);
      annotations.push(...notes);
    });
    find(".chart-title").textContent = alone ? chosen[0].title : chosen.length ? `${chosen.length} results` : "";
    const chart = find(".chart");
    const hasCurves = data.some((trace) => trace.meta === "seed");
    chart.classList.toggle("empty", !hasCurves);
    if (!hasCurves) {
      Plotly.purge(chart);
      chart.textContent = chosen.length ? "Not run yet: there are no curves." : "";
      return;
    }
    if (!chart.querySelector(".plot-container")) chart.textContent = "";
    const narrow = root.clientWidth < 560;
    const kinds = new Set(chosen.map(own));
    const axis = {
      gridcolor: css("--color-background-border"), linecolor: css("--color-background-border"),
      zerolinecolor: css("--color-background-border"), automargin: true,
    };
    Plotly.react(chart, data, {
      height: narrow ? 380 : 460, shapes, annotations, hovermode: "closest", dragmode: narrow ? false : "zoom",
      margin: { l: 48, r: 16, t: 12, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css("--font-stack"), size: 12, color: css("--color-foreground-primary") },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: narrow ? 11 : 12 } },
      xaxis: { ...axis, title: { text: "env steps", standoff: 8 }, nticks: narrow ? 5 : 9 },
      yaxis: { ...axis, title: { text: kinds.size === 1 ? [...kinds][0] : "return" } },
      hoverlabel: { font: { family: css("--font-stack") } },
    }, { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
  }

  // Buttons that choose between the curves of evaluations and of training episodes.
  function showKinds() {
    const chosen = selected.map((name) => results.get(name));
    const kinds = ["evaluation return", "training return"].filter((each) => chosen.some((result) => result.curves[each]));
    find(".curve-kinds").replaceChildren(...(kinds.length < 2 ? [] : kinds.map((each) => {
      const button = element("button", each.replace(" return", "s").replace("trainings", "training"));
      button.type = "button";
      button.setAttribute("aria-pressed", each === (kind || chosen[0].kind));
      button.addEventListener("click", () => { kind = each; showKinds(); draw(); });
      return button;
    })));
  }

  // --- details

  function element(tag, content = "", className = "") {
    const made = document.createElement(tag);
    made.className = className;
    made.append(...[content].flat());
    return made;
  }

  function link(text, address) {
    const made = element("a", text);
    made.href = address;
    return made;
  }

  function codeBlock(text) {
    const button = element("button", "Copy", "copy");
    button.type = "button";
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    return element("div", [element("pre", text), button], "code");
  }

  function fold(title, content) {
    return element("details", [element("summary", title), content]);
  }

  function details(result) {
    const facts = element("div", [], "facts");
    const verdict = element("span", result.verdict, `verdict ${result.verdict.replace(" ", "-")}`);
    facts.append(element("p", [verdict, ` ${result.because}`]));
    const published = result.published.map((each) =>
      element("li", [`${each.number}: `, each.address ? link(each.label, each.address) : each.label, `; ${each.measured}`]));
    if (published.length) facts.append(element("p", "Published:", "before-list"), element("ul", published));
    facts.append(element("p", `Measured by: ${result.measured}, at ${result.envSteps.toLocaleString("en")} env steps.`));
    facts.append(codeBlock(result.commands));
    facts.append(fold("Config", codeBlock(result.config)));
    const provenance = Object.entries(result.provenance).flatMap(([label, text]) => [element("dt", label), element("dd", text)]);
    if (provenance.length) facts.append(fold("Provenance", element("dl", provenance)));
    facts.append(element("p", link(`Page of this result: experiments/${result.name}`, `${result.name}.html`)));
    const parts = [facts];
    if (result.animation) {
      const picture = element("img", [], "policy");
      picture.src = `../_static/results/${result.name}.webp`;
      picture.alt = `The trained policy of ${result.title} in its env`;
      parts.unshift(picture);
    }
    const body = element("div", parts, "result-body");
    return selected.length > 1 ? [element("h3", result.title), body] : [body];
  }

  // --- events

  function update() {
    keepShown();
    showRows();
    showKinds();
    draw();
    find(".details").replaceChildren(...selected.flatMap((name) => details(results.get(name))));
  }

  function change(names) {
    selected = names;
    update();
    writeAddress();
  }

  for (const row of rows) {
    const { name } = row.dataset;
    const box = row.querySelector("input");
    row.addEventListener("click", (event) => {
      if (event.target === box) {
        change(box.checked ? [...selected, name] : selected.filter((each) => each !== name));
      } else if (!event.target.closest("a") && !event.target.closest(".pick")) {
        change([name]);
      }
    });
    // The link leads to the result's page where scripts do not run; here it selects, unless a new tab is asked for.
    row.querySelector("a").addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      change([name]);
    });
  }
  for (const filter of filters) filter.addEventListener("change", () => change(selected));
  find(".filters").addEventListener("submit", (event) => event.preventDefault());
  find(".reset").addEventListener("click", () => { find(".filters").reset(); change(selected); });
  window.addEventListener("hashchange", () => {
    const hash = decodeURIComponent(location.hash.slice(1));
    // Links within the page, such as "Back to top", have hashes of their own.
    if (hash.includes("=") || hash.split(",").some((name) => results.has(name))) { readAddress(); update(); }
  });
  new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["data-theme"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  readAddress();
  update();
  const first = root.querySelector("tr.selected");
  if (first) find(".rows").scrollTop = first.offsetTop - find(".rows").clientHeight / 2;
})();
