// Filter, order and pages for the samples of a report. Reads no text but what a person types.
for (const box of document.querySelectorAll('.samples')) {
  const size = 5, tools = box.querySelector('.tools'), list = box.querySelector('.list');
  const [words, order] = [tools.querySelector('input'), tools.querySelector('.order')];
  const filters = [...tools.querySelectorAll('.filter')];
  const [back, next] = tools.querySelectorAll('button'), where = tools.querySelector('span');
  const cards = [...list.children], texts = cards.map(
    card => [...card.querySelectorAll('.words')].map(each => each.textContent).join('\n').toLowerCase());
  let page = 0;
  const show = () => {
    const [column, sign] = order.value.split(' ').map(Number), asked = words.value.toLowerCase();
    const number = i => parseFloat(cards[i].dataset.numbers.split(' ')[column]);
    const chosen = i => cards[i].dataset.choices.split('\n').every((word, n) => !filters[n]?.value || filters[n].value === word);
    let found = cards.map((_, i) => i).filter(i => texts[i].includes(asked) && chosen(i));
    if (sign) found = found.filter(i => !isNaN(number(i))).sort((a, b) => sign * (number(a) - number(b)) || a - b);
    const pages = Math.max(1, Math.ceil(found.length / size));
    page = Math.max(0, Math.min(page, pages - 1));
    const shown = found.slice(page * size, (page + 1) * size);
    cards.forEach(card => card.hidden = true);
    shown.forEach(i => { cards[i].hidden = false; list.append(cards[i]); });
    where.textContent = found.length ? `${page * size + 1} to ${page * size + shown.length} of ${found.length}` : 'none';
    back.disabled = page === 0; next.disabled = page === pages - 1;
  };
  const restart = () => { page = 0; show(); };
  words.oninput = order.onchange = restart;
  filters.forEach(filter => filter.onchange = restart);
  back.onclick = () => { page -= 1; show(); };
  next.onclick = () => { page += 1; show(); };
  tools.hidden = false;
  show();
}
// On paper nothing can be unfolded.
addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(each => each.open = true));
