// The page to look at: what is picked stands behind the # of the address, all that is shown in the page's own data.
(() => {
  const data = JSON.parse(document.getElementById('look-data').textContent)
  const form = document.getElementById('look'), field = name => form.elements[name]
  const shown = document.getElementById('look-shown'), sides = ['left', 'right']
  const network = name => data.networks.find(n => n.name === name)
  const number = v => v.toFixed(1)
  const photos = Object.keys(data.photographs)

  function make(tag, attributes, ...children) {
    const svg = ['svg', 'path', 'text', 'line', 'title'].includes(tag)
    const e = svg ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag)
    for (const [k, v] of Object.entries(attributes || {})) e.setAttribute(k, v)
    e.append(...children)
    return e
  }

  function fill(select, values, wanted, say = v => v) {
    select.replaceChildren(...values.map(v => make('option', {value: v}, say(v))))
    if (values.includes(wanted)) select.value = wanted
  }

  // what is picked: from the address, and where that says nothing that there is, from the start
  function picked() {
    const said = new URLSearchParams(location.hash.slice(1).replaceAll('+', '%2B')), picks = {photo: said.get('photo')}
    if (!photos.includes(picks.photo)) picks.photo = photos[0]
    sides.forEach((side, i) => {
      const [name, method] = (said.get(side) || '').split('/')
      const n = network(name) || data.networks[Math.min(i, data.networks.length - 1)]
      picks[side] = {network: n, method: n.methods.includes(method) ? method : n.methods[0]}
    })
    return picks
  }

  const look = (picks, side, method) =>
    data.looks[`${picks[side].network.name}/${picks.photo}/${method || picks[side].method}`]

  function picture(element, n, photo, column, alt) {
    const rows = photos.length - 1, columns = n.methods.length
    element.style.backgroundImage = `url("../_static/looking/${n.sheet}")`
    element.style.backgroundSize = `${100*(columns + 1)}% ${100*(rows + 1)}%`
    element.style.backgroundPosition = `${100*column/columns}% ${rows ? 100*photos.indexOf(photo)/rows : 0}%`
    element.setAttribute('aria-label', alt)
  }

  const W = 360, H = 220, LEFT = 38, BOTTOM = 34, TOP = 8, RIGHT = 10
  function chart(kind, picks) {
    const yardsticks = sides.filter(side => picks[side].method !== 'random').map(
      side => [`${side} random`, look(picks, side, 'random')]).filter(([, o]) => o)
    const curves = [...yardsticks, ...sides.map(side => [side, look(picks, side)])]
    const highest = Math.max(...curves.flatMap(([, o]) => o[`${kind}_curve`]))
    const top = [1, 2, 5, 10, 20, 50, 100].find(v => v >= highest) || 100
    const x = v => LEFT + v/100*(W - LEFT - RIGHT), y = v => H - BOTTOM - v/top*(H - TOP - BOTTOM)
    const alt = sides.map(side => `${side}: area ${number(look(picks, side)[kind])} percent`).join(', ')
    const svg = make('svg', {viewBox: `0 0 ${W} ${H}`, role: 'img', 'aria-label': `${kind} curves; ${alt}`})
    for (const v of [0, top/2, top]) {
      svg.append(make('line', {class: 'look-grid', x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v)}),
                 make('text', {x: LEFT - 5, y: y(v) + 4, 'text-anchor': 'end'}, v === top ? `${v} %` : String(v)))
    }
    for (const v of [0, 50, 100]) {
      const anchor = v === 100 ? 'end' : v ? 'middle' : 'start'
      svg.append(make('text', {x: x(v), y: H - BOTTOM + 15, 'text-anchor': anchor}, `${v} %`))
    }
    svg.append(make('text', {x: x(50), y: H - 3, 'text-anchor': 'middle'}, 'of the pixels exchanged'))
    for (const [classes, o] of curves) {
      const d = o[`${kind}_curve`].map(
        (v, i) => `${i ? 'L' : 'M'}${x(data.fraction[i]).toFixed(1)} ${y(v).toFixed(1)}`).join('')
      svg.append(make('path', {class: `look-line ${classes}`, d}))
    }
    document.getElementById(`look-${kind}`).replaceChildren(svg)
  }

  const row = (kind, head, cells) => make('tr', {}, make('th', {scope: 'row'}, head),
    ...cells.map(c => make(kind, kind === 'th' ? {scope: 'col'} : {}, c)))

  function rows(picks) {
    const of = say => sides.map(side => say(look(picks, side), look(picks, side, 'random')))
    const noise = kind => of((_, random) => random ? number(random[kind]) : '—')
    return [
      row('th', '', sides.map(side => `${side}: ${picks[side].network.title}, ${picks[side].method}`)),
      row('td', 'class named', of(o => o.name)),
      row('td', 'its probability', of(o => number(o.probability))),
      row('td', 'insertion', of(o => number(o.insertion))),
      row('td', 'insertion, random map', noise('insertion')),
      row('td', 'deletion', of(o => number(o.deletion))),
      row('td', 'deletion, random map', noise('deletion'))]
  }

  function show() {
    const picks = picked(), subject = data.photographs[picks.photo]
    fill(field('photo'), photos, picks.photo, v => `${v}: ${data.photographs[v]}`)
    const first = picks.left.network, says = []
    picture(document.getElementById('look-photo'), first, picks.photo, 0, `Photograph: ${subject}`)
    for (const side of sides) {
      const {network: n, method} = picks[side], o = look(picks, side)
      fill(field(`${side}-network`), data.networks.map(n => n.name), n.name, v => network(v).title)
      fill(field(`${side}-method`), n.methods, method)
      const element = document.getElementById(`look-${side}`)
      picture(element, n, picks.photo, 1 + n.methods.indexOf(method),
              `Map by ${method} of the network ${n.title} for the class ${o.name}, over ${subject}`)
      element.nextElementSibling.replaceChildren(
        make('b', {}, `${n.title}, ${method}`), make('br'), `“${o.name}”, ${number(o.probability)} %`)
      says.push(`${side === 'left' ? 'Left' : 'Right'}: ${n.title} names it “${o.name}” with ` +
                `${number(o.probability)} %; ${method} has insertion ${number(o.insertion)} ` +
                `and deletion ${number(o.deletion)}.`)
    }
    document.getElementById('look-summary').textContent = says.join(' ')
    chart('insertion', picks)
    chart('deletion', picks)
    const table = document.getElementById('look-table')
    table.replaceChildren(table.caption, make('tbody', {}, ...rows(picks)))
  }

  form.addEventListener('change', () => {
    const side = s => `${s}=${field(`${s}-network`).value}/${field(`${s}-method`).value}`
    history.replaceState(null, '', `#photo=${field('photo').value}&${sides.map(side).join('&')}`)
    show()
  })
  form.addEventListener('submit', event => event.preventDefault())
  addEventListener('hashchange', show)
  form.hidden = shown.hidden = false
  show()
})()
