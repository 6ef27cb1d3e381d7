// The stored association task: keys, values and writes, what a program is given for them, and what
// its memory recalls. All operands follow from their roles; see `_operand` in __init__.py.

// Mulberry32, and normal numbers by Box and Muller: one seed is one task in every browser.
function randomness(seed) {
  let a = seed >>> 0;
  const uniform = () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), a | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
  const normal = () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform());
  return {
    normals: n => Array.from({ length: n }, normal),
    shuffled: xs => xs.map(x => [uniform(), x]).sort((x, y) => x[0] - y[0]).map(x => x[1]),
  };
}

const dot = (x, y) => x.reduce((sum, a, i) => sum + a * y[i], 0);
const mean = x => x.reduce((sum, a) => sum + a, 0) / x.length;
const scaled = (x, a) => x.map(b => a * b);
const plus = (x, y, a = 1) => x.map((b, i) => b + a * y[i]);
const unit = x => scaled(x, 1 / Math.sqrt(dot(x, x)));
const without = (x, axis) => plus(x, axis, -dot(x, axis));

// Keys are sqrt(overlap) c + sqrt(1 - overlap) u: a direction c that all share, and one of their own
// at a right angle to it, so that `overlap` is the mean cosine of two of them.
function makeTask(settings, sizes) {
  const { pairs, overlap, noise, writes, along, seed } = settings;
  const random = randomness(seed);
  let shared = random.normals(sizes.key);
  if (along === "channels") {
    const chosen = random.shuffled([...shared.keys()]).slice(0, 2);
    shared = shared.map((x, i) => (chosen.includes(i) ? Math.sign(x) : 0));
  }
  const axes = [unit(shared)];
  while (axes.length < sizes.key) {
    axes.push(unit(axes.reduce(without, axes.reduce(without, random.normals(sizes.key)))));
  }
  const keys = [], values = [];
  for (let i = 0; i < pairs; i++) {
    const own = unit(without(random.normals(sizes.key), axes[0]));
    keys.push(unit(plus(scaled(axes[0], Math.sqrt(overlap)), own, Math.sqrt(1 - overlap))));
    values.push(random.normals(sizes.value));
  }
  const all = keys.map((_, pair) => pair);
  let order = all;
  if (writes === "repeated") order = random.shuffled([0, 1, 2].flatMap(() => all));
  if (writes === "overwritten") order = [...random.shuffled(all), ...random.shuffled(all)];
  const list = order.map((pair, t) => {
    const other = writes === "overwritten" && t < pairs;
    const clean = other ? random.normals(sizes.value) : values[pair];
    return { pair, clean, value: plus(clean, random.normals(sizes.value), noise) };
  });
  return { keys, values, writes: list, axes };
}

const FEATURES = {
  // What a key is before it is written, without learned parts: `glazoo.compare.probe` has the same.
  quadratic(x) {
    const m = mean(x), variance = mean(x.map(a => (a - m) ** 2));
    const normed = x.map(a => ((a - m) / Math.sqrt(variance + 1e-5)) * x.length ** -0.25);
    return normed.flatMap(a => normed.map(b => a * b));
  },
  taylor(x) {
    const small = scaled(x, x.length ** -0.25);
    return [1, ...small, ...small.flatMap(a => small.map(b => a * b * Math.SQRT1_2))];
  },
  one_minus_decay: x => x.map(a => Math.min(Math.abs(a), 1 - 1e-4)),
};

class Memory {
  // A program with constant gates, and what it makes of keys and values.
  constructor(program, gates, axes, sizes) {
    Object.assign(this, { program, gates });
    const feature = FEATURES[program.feature] ?? (x => x);
    const length = program.own_scale ? gates.key_scale : 1;
    this.mapped = x => feature(scaled(x, length));
    const K = this.mapped(axes[0]).length;
    this.sizes = { K, V: sizes.value, 1: 1, "": 1 };
    const basis = matrix(K, K, Float64Array.from({ length: K * K }, (_, i) => axes[i % K]?.[Math.floor(i / K)] ?? 0));
    this.basis = K === axes.length ? basis : identity(K);
    const constants = { scale: number(program.scale ?? K ** -0.5), K: number(K), Id: identity(K) };
    for (const operand of program.operands) {
      if (operand.index === "") constants[operand.symbol] = this.operand(operand, null, null);
    }
    this.recurrence = new Recurrence(program.recurrence, constants);
  }

  // The state that nothing was written to, by symbol.
  start() {
    return Object.fromEntries(this.program.state.map(part => {
      const [r, c = ""] = part.shape;
      return [part.symbol, filled(this.sizes[r], this.sizes[c], part.start ?? -Infinity)];
    }));
  }

  operand(operand, key, value) {
    const { fill, size } = operand, n = this.sizes[size];
    if (fill === "key") return column(key);
    if (fill === "value") return column(value);
    if (fill === "basis") return this.basis;
    if (fill === "lost_key") return column(key.map(a => Math.log1p(-a)));
    if (fill === "query") return filled(n, 1, 0);
    const { gates } = this;
    if (fill === "decay") return filled(n, 1, Math.log(gates.decay));
    if (fill === "noise") return filled(n, 1, 1 - gates.decay ** 2);
    return filled(n, 1, typeof fill === "number" ? fill : gates[fill]);
  }

  // A token: `key` and `value` are written, at its last sub-token; without them it changes nothing.
  token(key, value, query) {
    const values = {}, constants = {}, parts = Array.from({ length: this.program.substeps }, () => ({}));
    for (const operand of this.program.operands) {
      const idle = () => {
        if (operand.idle === null) return this.operand(operand, key, value);
        return filled(this.sizes[operand.size], 1, operand.idle);
      };
      if (operand.fill === "query") values[operand.symbol] = query ?? this.operand(operand);
      else if (operand.index === "t") values[operand.symbol] = key ? this.operand(operand, key, value) : idle();
      else if (operand.index === "i") {
        parts.forEach((part, i) => {
          const written = key && i === parts.length - 1;
          part[operand.symbol] = written ? this.operand(operand, key, value) : idle();
        });
      } else if (!key) constants[operand.symbol] = idle();
    }
    return { values, parts, constants };
  }

  write(state, key, value) {
    const { last } = this.recurrence.step(state, this.token(this.mapped(key), value, null));
    return Object.fromEntries(this.program.state.map(part => [part.symbol, last[part.symbol]]));
  }

  // What each key is answered with, and the variance of the answer, mean over its channels, in units
  // of that which a prior of one leaves where nothing was read.
  read(state, keys) {
    const queries = keys.map(key => {
      let query = this.mapped(key);
      if (this.program.feature === "one_minus_decay") {
        // Keys that are all positive share their mean; a query may have any sign.
        const m = mean(query);
        query = query.map(a => a - m);
      }
      return query;
    });
    const scale = this.recurrence.constants.scale.d[0];
    const tokens = queries.map(query => this.token(null, null, column(query)));
    return Array.from(this.recurrence.reads(state, tokens), ({ y_t, var_t }, i) => ({
      output: Array.from(y_t.d),
      variance: var_t ? mean(var_t.d) / (scale ** 2 * dot(queries[i], queries[i])) : null,
    }));
  }
}

// How alike an answer and a value are, from -1 to 1, whatever the answer's size.
function cosine(x, y) {
  const found = dot(x, y) / Math.sqrt(dot(x, x) * dot(y, y));
  return Number.isFinite(found) ? found : 0;
}

// Whether an answer is nearer to its pair's value than to any other that is stored; null is none.
function judge(stored, pair, output) {
  const alike = stored.map(value => (value ? cosine(output, value) : -Infinity));
  // A tie with another value finds nothing.
  const found = alike[pair] > 0 && alike.every((a, i) => i === pair || a < alike[pair]);
  return { alike: alike[pair], found };
}

// Runs a program over a task: the state after every write, and what each pair is then answered with.
function explore(program, gates, task, sizes, everyToken = true) {
  const memory = new Memory(program, gates, task.axes, sizes);
  const states = [memory.start()], stored = [task.keys.map(() => null)];
  for (const { pair, clean, value } of task.writes) {
    states.push(memory.write(states.at(-1), task.keys[pair], value));
    stored.push(stored.at(-1).map((x, i) => (i === pair ? clean : x)));
  }
  const read = (state, t) => memory.read(state, task.keys).map((answer, pair) => ({
    ...answer,
    ...judge(stored[t], pair, answer.output),
  }));
  const reads = everyToken ? states.map(read) : [read(states.at(-1), states.length - 1)];
  return { memory, states, reads };
}
