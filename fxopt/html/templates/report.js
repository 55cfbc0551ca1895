"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const DATA = JSON.parse($("data").textContent);
  const el = (tag, cls, text) => {
    const made = document.createElement(tag);
    if (cls) made.className = cls;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const svg = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  const counted = (number) => `${number.toLocaleString("en")} node${number === 1 ? "" : "s"}`;

  // --- theme and tabs ---------------------------------------------------------------------------------------------

  const setTheme = (name) => (document.documentElement.dataset.theme = name);
  const kept = (() => { try { return localStorage.getItem("fxopt-theme"); } catch { return null; } })();
  setTheme(kept || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  $("theme").onclick = () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    try { localStorage.setItem("fxopt-theme", document.documentElement.dataset.theme); } catch { /* a file may keep nothing */ }
  };
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const show = (name) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab.dataset.tab === name));
      $(tab.dataset.tab).hidden = tab.dataset.tab !== name;
    }
    if (name === "graphs" && !view) choose(0);
    if (name === "memory") drawMemory();
  };
  for (const tab of tabs) tab.onclick = () => show(tab.dataset.tab);

  // --- graphs: reading ----------------------------------------------------------------------------------------------

  const parse = (graph, stage) => {
    const text = (at) => graph.texts[+at];
    const nodes = stage.nodes.split(" ").filter(Boolean).map((at) => {
      const [name, call, inputs, module, kind, source, code, rule] = graph.lines[+at].split(" ");
      return {
        line: +at, name: text(name), call: text(call), inputs: inputs ? inputs.split(",").map(text) : [],
        module: text(module), kind: text(kind), source: text(source), code: text(code), rule: text(rule), users: [],
      };
    });
    const byName = new Map(nodes.map((node) => [node.name, node]));
    for (const node of nodes) for (const input of new Set(node.inputs)) byName.get(input)?.users.push(node.name);
    return { name: stage.name, nodes, byName };
  };
  const near = (side) => {
    // what changed, and two hops around it
    let found = new Set(side.nodes.filter((node) => node.changed).map((node) => node.name));
    for (let hop = 0; hop < 2; hop++) {
      const more = new Set(found);
      for (const name of found) {
        const node = side.byName.get(name);
        for (const other of node.inputs) if (side.byName.has(other)) more.add(other);
        for (const other of node.users) more.add(other);
      }
      found = more;
    }
    return found;
  };
  const short = (name) => name.replace(/^l_(self_|kwargs_|args_)*/i, "").replace(/_?(modules|parameters|buffers)(?=_)/g, "").replace(/^_+|_+$/g, "") || name;
  const title = (node) => {
    let at = 0;
    return node.call.replace(/·/g, () => short(node.inputs[at++] ?? "?"));
  };

  // --- graphs: a tree of modules, repeated layers folded ----------------------------------------------------------------

  const pathOf = (node) => {
    if (node.call === "placeholder") return ["inputs"];
    const parts = [];
    for (const part of node.module ? node.module.split(".") : []) {
      if (/^\d+$/.test(part) && parts.length) parts[parts.length - 1] += "." + part;
      else parts.push(part);
    }
    return parts;
  };
  const tree = (side) => {
    const root = { name: "", children: [], count: 0, changed: 0 };
    let open = [root];
    for (const node of side.nodes) {
      const path = pathOf(node);
      let depth = 0;
      while (depth < path.length && open[depth + 1]?.name === path[depth]) depth++;
      open = open.slice(0, depth + 1);
      for (; depth < path.length; depth++) {
        const group = { name: path[depth], children: [], count: 0, changed: 0 };
        open[depth].children.push(group);
        open.push(group);
      }
      open[open.length - 1].children.push({ node });
      for (const group of open) { group.count++; group.changed += node.changed ? 1 : 0; }
    }
    return root;
  };
  const signatures = new Map();
  const signature = (item) => {
    if (item.node) return `${item.node.call}|${item.node.kind}|${item.node.rule}|${item.node.changed ? 1 : 0}`;
    if (item.sign === undefined) {
      const whole = item.name.replace(/\.\d+$/, ".*") + "(" + item.children.map(signature).join(";") + ")";
      if (!signatures.has(whole)) signatures.set(whole, `#${signatures.size}`);
      item.sign = signatures.get(whole);
    }
    return item.sign;
  };
  const folded = (children) => {
    const found = [];
    for (const item of children) {
      const last = found[found.length - 1];
      const alike = last && !item.node && !last[0].node && /\.\d+$/.test(item.name) && signature(last[0]) === signature(item);
      if (alike) last.push(item);
      else found.push([item]);
    }
    return found;
  };

  // --- graphs: drawing --------------------------------------------------------------------------------------------------

  let view = null;
  const fill = (body, children, side) => {
    let hidden = [];
    const flush = () => {
      if (!hidden.length) return;
      const items = hidden;
      const gap = el("div", "gap", `… ${counted(items.reduce((sum, item) => sum + (item.count ?? 1), 0))} as before`);
      gap.onclick = () => { const part = document.createDocumentFragment(); fill(part, items, { ...side, shown: null }); gap.replaceWith(part); };
      body.append(gap);
      hidden = [];
    };
    for (const run of folded(children)) {
      const item = run[0];
      if (side.shown && !shows(item, side)) { hidden.push(...run); continue; }
      flush();
      body.append(item.node ? drawNode(item.node, side) : drawGroup(run, side));
    }
    flush();
  };
  const shows = (item, side) => (item.node ? side.shown.has(item.node.name) : item.children.some((child) => shows(child, side)));
  const drawNode = (node, side) => {
    const row = el("div", "node" + (node.changed ? (side.after ? " add" : " del") : ""));
    row.append(`${short(node.name)} = ${title(node)} `, el("u", "", node.kind));
    row.title = [node.source, node.code].filter(Boolean).join("\n");
    row.onclick = () => select(node.name, side.after);
    node.row = row;
    if (view && view.hits.has(node.name)) row.classList.add("hit");
    return row;
  };
  const drawGroup = (run, side) => {
    const item = run[0];
    const group = el("div", "group");
    const head = el("div", "head", run.length > 1 ? `${item.name} … ${run[run.length - 1].name} ` : `${item.name} `);
    if (run.length > 1) head.append(el("b", "times", `× ${run.length} `));
    head.append(el("em", "", `${counted(item.count)} `));
    if (item.changed && item.changed < item.count) head.append(el("span", side.after ? "plus" : "minus", `${side.after ? "+" : "−"}${item.changed} `));
    if (run.length > 1) {
      const apart = el("a", "", "unfold");
      apart.href = "#";
      apart.onclick = (event) => { event.preventDefault(); event.stopPropagation(); unfold(); };
      head.append(apart);
    }
    const unfold = () => group.replaceWith(...run.map((one) => drawGroup([one], side)));
    const body = el("div", "body");
    const toggle = (open) => {
      if (open && !body.childNodes.length) fill(body, item.children, side);
      group.classList.toggle("open", open);
      body.hidden = !open;
    };
    body.hidden = true;
    head.onclick = () => toggle(body.hidden);
    for (const one of run) { one.toggle = one === item ? toggle : null; one.unfold = run.length > 1 ? unfold : null; }
    group.append(head, body);
    const few = item.count <= 40 || (item.changed && item.count < 400) || item.name === "model" || side.root.children.length === 1;
    if (few && item.name !== "inputs") toggle(true);
    return group;
  };
  const draw = () => {
    for (const [id, side] of [["before", view.before], ["after", view.after]]) {
      side.shown = $("near").checked ? near(side) : null;
      side.root = tree(side);
      $(id).replaceChildren();
      $("name-" + id).textContent = `${id}: ${side.name}, ${counted(side.nodes.length)}`;
      fill($(id), side.root.children, side);
    }
    const gone = view.before.nodes.filter((node) => node.changed).length;
    const made = view.after.nodes.filter((node) => node.changed).length;
    $("count").textContent = `${counted(gone)} gone, ${made} new`;
  };
  const pair = (index) => {
    const graph = DATA.graphs[view.graph];
    const [before, after] = [graph.stages[index], graph.stages[index + 1] ?? graph.stages[index]].map((stage) => parse(graph, stage));
    const lines = [before, after].map((side) => new Set(side.nodes.map((node) => node.line)));
    for (const node of before.nodes) node.changed = !lines[1].has(node.line);
    for (const node of after.nodes) node.changed = !lines[0].has(node.line);
    after.after = true;
    Object.assign(view, { index, before, after });
    const changed = after.nodes.filter((node) => node.changed).length;
    $("near").checked = changed > 0 && changed < after.nodes.length / 2;
    for (const [at, button] of [...$("stages").children].entries()) button.setAttribute("aria-pressed", String(at === index));
    $("detail").replaceChildren(el("p", "hint", "Click a node: what it reads, who reads it, and where it comes from."));
    draw();
    search();
  };
  const choose = (at, index) => {
    const graph = DATA.graphs[at];
    view = { graph: at, hits: new Set() };
    $("graph").value = String(at);
    if (!graph.stages.length) {
      $("before").replaceChildren(el("p", "gap", "the graphs were not recorded: `fxopt explain` and options={\"dump\": ...} record them"));
      return;
    }
    const steps = Math.max(1, graph.stages.length - 1);
    $("stages").replaceChildren(...Array.from({ length: steps }, (_, step) => {
      const button = el("button", "", `${graph.stages[step].name} → ${(graph.stages[step + 1] ?? graph.stages[step]).name}`);
      button.onclick = () => pair(step);
      return button;
    }));
    const rewrite = graph.stages.findIndex((stage) => stage.name === "rewrite");
    pair(index ?? Math.max(0, rewrite - 1));
  };
  DATA.graphs.forEach((graph, at) => $("graph").append(Object.assign(el("option", "", graph.name), { value: String(at) })));
  $("graph").hidden = DATA.graphs.length < 2;
  $("graph").onchange = () => choose(+$("graph").value);
  $("near").onchange = () => { draw(); search(); };

  // --- graphs: selection, in both panes ------------------------------------------------------------------------------------

  const sideOf = (after) => (after ? view.after : view.before);
  const locate = (side, name, items = side.root.children) => {
    for (const item of items) {
      if (item.node ? item.node.name === name : false) return [];
      if (!item.node) {
        const below = locate(side, name, item.children);
        if (below) return [item, ...below];
      }
    }
    return null;
  };
  const reveal = (side, name) => {
    const node = side.byName.get(name);
    if (!node) return null;
    if (side.shown && !side.shown.has(name)) { side.shown = null; const box = $(side.after ? "after" : "before"); box.replaceChildren(); fill(box, side.root.children, side); }
    for (const group of locate(side, name) ?? []) {
      if (group.toggle === null || group.toggle === undefined) group.unfold?.();
      group.toggle?.(true);
    }
    node.row?.scrollIntoView({ block: "center" });
    return node;
  };
  const counterpart = (name, after) => {
    // the same node on the other side; of a site, what stands in its place
    const other = sideOf(!after), mine = sideOf(after);
    if (other.byName.has(name)) return name;
    const rewrites = DATA.graphs[view.graph].rewrites;
    if (after) return rewrites.find((one) => one.made.includes(name))?.node ?? null;
    const anchors = new Map(rewrites.map((one) => [one.node, one]));
    const seen = new Set([name]);
    for (const at of seen) {
      const made = anchors.get(at)?.made.find((one) => other.byName.has(one));
      if (made) return made;
      for (const user of mine.byName.get(at)?.users ?? []) if (mine.byName.get(user).changed) seen.add(user);
    }
    return null;
  };
  const mark = (side, name) => {
    for (const node of side.nodes) node.row?.classList.remove("sel", "in", "out");
    const node = name && reveal(side, name);
    if (!node) return;
    for (const input of node.inputs) side.byName.get(input)?.row?.classList.add("in");
    for (const user of node.users) side.byName.get(user)?.row?.classList.add("out");
    node.row?.classList.add("sel");
  };
  const select = (name, after) => {
    mark(sideOf(!after), counterpart(name, after));
    mark(sideOf(after), name);
    describe(sideOf(after), sideOf(after).byName.get(name));
  };
  const link = (name, after) => {
    const made = el("a", "", short(name));
    made.href = "#";
    made.onclick = (event) => { event.preventDefault(); select(name, after); };
    return made;
  };
  const describe = (side, node) => {
    const box = $("detail");
    box.replaceChildren();
    const line = (label, ...parts) => {
      const row = el("p");
      row.append(el("b", "", label + " "), ...parts);
      box.append(row);
    };
    line(node.name, el("code", "", `${title(node)}  ${node.kind}`));
    const facts = [node.module && `module ${node.module}`, node.source, node.rule && `made by rule ${node.rule}`].filter(Boolean);
    if (facts.length || node.code) { line("from", facts.join(" · "), node.code ? el("pre", "", node.code) : ""); }
    if (node.inputs.length) line("reads", ...node.inputs.flatMap((name) => [link(name, side.after), " "]));
    if (node.users.length) line("read by", ...node.users.flatMap((name) => [link(name, side.after), " "]));
    box.append(neighbourhood(side, node));
  };
  const neighbourhood = (side, node) => {
    // two hops up and down, a row a hop
    const levels = [[node.name]], seen = new Set([node.name]);
    const step = (names, way) => {
      const found = [];
      for (const name of names) for (const other of side.byName.get(name)?.[way] ?? []) if (side.byName.has(other) && !seen.has(other)) { seen.add(other); found.push(other); }
      return found;
    };
    const up1 = step([node.name], "inputs"), up2 = step(up1, "inputs"), down1 = step([node.name], "users"), down2 = step(down1, "users");
    const rows = [up2, up1, levels[0], down1, down2].filter((row) => row.length);
    const most = 7, wide = 192, high = 46;
    const width = Math.min(most + 1, Math.max(...rows.map((row) => row.length))) * wide;
    const picture = svg("svg", { width, height: rows.length * high, viewBox: `0 0 ${width} ${rows.length * high}` });
    const at = new Map();
    rows.forEach((row, level) => row.slice(0, most).forEach((name, index) => {
      const count = Math.min(row.length, most);
      at.set(name, [width / 2 + (index - (count - 1) / 2) * wide, level * high + 18]);
    }));
    for (const name of at.keys()) for (const input of new Set(side.byName.get(name).inputs)) {
      if (!at.has(input)) continue;
      const [x, y] = at.get(input), [u, v] = at.get(name);
      picture.append(svg("path", { class: "edge", d: `M${x} ${y + 12}C${x} ${(y + v) / 2} ${u} ${(y + v) / 2} ${u} ${v - 12}` }));
    }
    for (const [name, [x, y]] of at) {
      const one = side.byName.get(name);
      const group = svg("g", {});
      const label = (one.call === "placeholder" ? short(name) : one.call.split("(")[0]).slice(-27);
      group.append(
        svg("rect", { class: "box" + (name === node.name ? " me" : one.changed ? (side.after ? " add" : " del") : ""), x: x - 90, y: y - 12, width: 180, height: 24, rx: 4 }),
        svg("text", { x, y: y + 4, "text-anchor": "middle" }, label), svg("title", {}, `${name}\n${one.call} ${one.kind}`));
      group.onclick = () => select(name, side.after);
      picture.append(group);
    }
    return picture;
  };
  for (const anchor of document.querySelectorAll(".go")) anchor.onclick = (event) => {
    event.preventDefault();
    show("graphs");
    const at = DATA.graphs.findIndex((graph) => graph.name === anchor.dataset.graph);
    const stages = DATA.graphs[at].stages;
    const into = stages.findIndex((stage) => stage.name === "rewrite");
    if (!stages.length) return choose(at);
    choose(at, Math.max(0, into - 1));
    if (view.before.byName.has(anchor.dataset.node)) select(anchor.dataset.node, false);
  };

  // --- search ---------------------------------------------------------------------------------------------------------------

  const search = () => {
    const words = $("search").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    const has = (text) => words.every((word) => text.toLowerCase().includes(word));
    for (const row of document.querySelectorAll("#site-table tbody tr")) row.hidden = words.length > 0 && !has(row.textContent);
    if (!view || !view.before) return;
    view.hits = new Set();
    let first = null;
    for (const side of [view.before, view.after]) for (const node of side.nodes) {
      const hit = words.length > 0 && has(`${node.name} ${node.call} ${node.kind} ${node.module} ${node.code} ${node.rule}`);
      if (hit) { view.hits.add(node.name); first ??= [side, node.name]; }
      node.row?.classList.toggle("hit", hit);
    }
    const total = view.hits.size;
    if (words.length) $("count").textContent = `${counted(total)} found`;
    if (first && !$("graphs").hidden) { for (const side of [view.before, view.after]) if (side.byName.has(first[1])) reveal(side, first[1]); }
  };
  let waiting = 0;
  $("search").oninput = () => { clearTimeout(waiting); waiting = setTimeout(search, 120); };

  // --- memory -----------------------------------------------------------------------------------------------------------------

  const mib = (bytes) => `${(bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 })} MiB`;
  const drawMemory = () => {
    const box = $("memory");
    if (box.childNodes.length) return;
    const tip = Object.assign(el("div"), { id: "tip", hidden: true });
    document.body.append(tip);
    const hover = (target, text) => {
      target.onmousemove = (event) => { tip.hidden = false; tip.textContent = text(event); tip.style.left = `${event.clientX + 14}px`; tip.style.top = `${event.clientY + 10}px`; };
      target.onmouseleave = () => (tip.hidden = true);
    };
    for (const chart of DATA.memory.filter(Boolean)) {
      box.append(el("h2", "", chart.graph));
      box.append(el("p", "", chart.summary));
      if (chart.points.length) box.append(drawChart(chart, hover));
      for (const note of chart.notes) box.append(el("p", "", note));
      box.append(tableOf(["at the peak", "size"], chart.parts.map((one) => [one.name, mib(one.bytes)])));
      const rows = chart.tensors.map((row) => [row.name, mib(row.bytes), row.decision, row.reason, row.source]);
      box.append(tableOf(["tensor", "size", "decision", "why", "source"], rows));
    }
  };
  const tableOf = (titles, rows) => {
    const table = el("table", "wide");
    for (const [kind, cells] of [["th", titles], ...rows.map((row) => ["td", row])]) {
      const line = el("tr");
      for (const cell of cells) line.append(el(kind, "", cell));
      table.append(line);
    }
    return table;
  };
  const drawChart = (chart, hover) => {
    const width = 1000, high = 240, points = chart.points;
    const limits = [["limit", "budget", chart.budget], ["measured", "measured peak", chart.measured]].filter((one) => one[2] !== null);
    const top = 1.08 * Math.max(...points.map((one) => one.bytes), ...limits.map((one) => one[2]));
    const x = (at) => (at * width) / Math.max(1, points.length - 1), y = (bytes) => high - (bytes * high) / top;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${high + 4}`, width: "100%", height: high, preserveAspectRatio: "none" });
    const path = points.map((one, at) => `${at ? "L" : "M"}${x(at).toFixed(1)} ${y(one.bytes).toFixed(1)}`).join("");
    const legend = el("p", "legend"), frame = el("div");
    legend.append(el("span", "key curve", `predicted over the step, at most ${mib(Math.max(...points.map((one) => one.bytes)))}`));
    picture.append(svg("path", { class: "area", d: `${path}L${width} ${high}L0 ${high}Z` }), svg("path", { class: "curve", d: path }));
    for (const [cls, name, bytes] of limits) {
      picture.append(svg("line", { class: cls, x1: 0, x2: width, y1: y(bytes), y2: y(bytes) }));
      legend.append(el("span", `key ${cls}`, `${name} ${mib(bytes)}`));
    }
    const tensors = new Map(chart.tensors.map((row) => [row.name, row]));
    hover(picture, (event) => {
      const area = picture.getBoundingClientRect();
      const at = Math.round(((event.clientX - area.left) / area.width) * (points.length - 1));
      const point = points[Math.min(points.length - 1, Math.max(0, at))], row = tensors.get(point.label);
      const about = row ? ` · ${row.decision}${row.reason ? `: ${row.reason}` : ""}${row.source ? ` · ${row.source}` : ""}` : "";
      return `${point.label}: ${mib(point.bytes)}${about}`;
    });
    frame.append(legend, picture);
    return frame;
  };
})();
