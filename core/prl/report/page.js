// The read-out under the pointer: the value of every curve at the nearest recorded step.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), box = svg.viewBox.baseVal;
  const left = chart.left, right = chart.right;
  const pointer = svg.querySelector(".pointer"), legend = svg.parentNode.querySelector(".legend");
  const at = legend.querySelector(".at"), values = legend.querySelectorAll(".value");
  const latest = [...values].map(v => v.textContent);
  svg.addEventListener("pointermove", event => {
    const frame = svg.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width * box.width;
    const step = chart.low + (chart.high - chart.low) * (Math.min(right, Math.max(left, x)) - left) / (right - left);
    chart.series.forEach(([name, points], i) => {
      const near = points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a);
      values[i].textContent = near[1];
    });
    pointer.setAttribute("x1", x); pointer.setAttribute("x2", x);
    at.textContent = "at " + Math.round(step);
  });
  svg.addEventListener("pointerleave", () => {
    pointer.setAttribute("x1", -9); pointer.setAttribute("x2", -9);
    at.textContent = ""; values.forEach((v, i) => v.textContent = latest[i]);
  });
}
