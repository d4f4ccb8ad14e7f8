'use strict';

// What the page shows comes from /next and from the answers to votes. Texts go
// into the page as text only.
const state = {judge: '', now: null, busy: false, ahead: []};
const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'onclick') element.addEventListener('click', value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function number() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (b) => b.toString(16).padStart(2, '0')).join('');
}

function say(text) {
  at('problem').textContent = text;
  at('problem').hidden = !text;
}

// The same sending, with the same id, until it is answered: the server writes
// an id once.
async function send(path, body) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const answer = await fetch(path, {
        method: 'POST',
        headers: {'content-type': 'application/json'},
        body: JSON.stringify(body),
      });
      const found = await answer.json();
      if (answer.ok) { say(''); return found; }
      if (answer.status < 500) { say(found.error); return null; }
    } catch (error) {
      // No answer: the server is away, or its answer was lost.
    }
    say('The server does not answer; your vote is kept and sent again.');
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

async function load() {
  const answer = await fetch('next?judge=' + encodeURIComponent(state.judge));
  const found = await answer.json();
  if (!answer.ok) { say(found.error); hello(); return; }
  show(found);
}

async function act(path, more) {
  if (state.busy) return;
  state.busy = true;
  const found = await send(path, {id: number(), judge: state.judge, ...more});
  state.busy = false;
  if (found) show(found); else load();
}

function picture(url) {
  const image = make('img', {src: url, alt: '', draggable: 'false'});
  image.addEventListener('load', () => {
    if (image.naturalWidth <= 128) image.className = 'small';
  });
  return image;
}

function choose(choice) {
  const [one] = state.now.shown;
  if (one) act('vote', {votes: [{item: one.item, question: one.question, choice}]});
}

function undo() { act('undo', {}); }

function button(text, key, action, kind = '') {
  return make('button', {onclick: action, class: kind, type: 'button'},
    text + ' ', make('kbd', {}, key));
}

function showPair(one) {
  const sides = ['left', 'right'].map((side, i) => make('button',
    {onclick: () => choose(side), 'data-side': side, type: 'button',
      'aria-label': side + ' image'}, picture(one.images[i])));
  return [
    make('h1', {}, one.ask),
    make('p', {class: 'prompt', dir: 'auto'}, one.prompt),
    make('div', {class: 'pair'}, ...sides),
    make('div', {class: 'row'},
      button('Left', '\u2190', () => choose('left')),
      button('About the same', 'space', () => choose('tie')),
      button('Right', '\u2192', () => choose('right')),
      button('Undo', 'U', undo)),
  ];
}

const NEXT = {benign: 'malign', malign: 'unsure', unsure: 'benign'};

function showGrid(shown) {
  const cells = shown.map((one) => {
    const mark = make('span');
    const cell = make('button', {class: 'cell', 'data-choice': 'benign',
      'data-item': one.item, type: 'button', title: one.prompt},
      picture(one.images[0]), mark);
    cell.addEventListener('click', () => {
      cell.dataset.choice = NEXT[cell.dataset.choice];
      mark.textContent = cell.dataset.choice;
    });
    return cell;
  });
  return [
    make('h1', {}, 'Click what is bad'),
    make('p', {class: 'prompt'}, 'Once for malign, twice for unsure, three times to take it back.'),
    make('div', {class: 'grid'}, ...cells),
    make('div', {class: 'row'},
      button('Next page', 'enter', sendGrid, 'main'),
      button('Undo', 'U', undo)),
  ];
}

function sendGrid() {
  const cells = document.querySelectorAll('.cell');
  const question = state.now.shown[0].question;
  const votes = Array.from(cells, (cell) => (
    {item: cell.dataset.item, question, choice: cell.dataset.choice}));
  act('vote', {votes});
}

function show(found) {
  state.now = found;
  at('progress').setAttribute('aria-valuemax', found.total);
  at('progress').setAttribute('aria-valuenow', found.done);
  at('bar').style.width = (found.total ? 100 * found.done / found.total : 0) + '%';
  at('count').textContent = found.done + ' / ' + found.total;
  at('who').textContent = state.judge;
  const stage = at('stage');
  if (!found.shown.length) {
    stage.replaceChildren(make('h1', {}, 'That is all. Thank you!'),
      make('div', {class: 'row'}, button('Undo', 'U', undo)));
  } else if (found.mode === 'likes') {
    stage.replaceChildren(...showGrid(found.shown));
  } else {
    stage.replaceChildren(...showPair(found.shown[0]));
  }
  // The next pictures are there before they are asked for.
  state.ahead = found.ahead.map((url) => { const i = new Image(); i.src = url; return i; });
}

const KEYS = {ArrowLeft: 'left', ArrowRight: 'right', ' ': 'tie', ArrowDown: 'tie'};

document.addEventListener('keydown', (event) => {
  if (at('hello').open || !state.now || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.repeat) return;
  if (event.key === 'u' || event.key === 'U' || event.key === 'Backspace') {
    event.preventDefault(); undo();
  } else if (state.now.mode === 'pairs' && event.key in KEYS) {
    event.preventDefault(); choose(KEYS[event.key]);
  } else if (state.now.mode === 'likes' && event.key === 'Enter' && state.now.shown.length) {
    event.preventDefault(); sendGrid();
  }
});

function hello() { at('hello').showModal(); at('name').focus(); }

at('start').addEventListener('click', (event) => {
  event.preventDefault();
  const name = at('name').value.trim();
  if (!name) return;
  state.judge = name;
  try { localStorage.setItem('judge', name); } catch (error) { /* Not kept. */ }
  at('hello').close();
  say('');
  load();
});

const given = new URLSearchParams(location.search).get('judge');
let known = null;
try { known = localStorage.getItem('judge'); } catch (error) { /* None. */ }
if (given || known) { state.judge = given || known; load(); } else hello();
