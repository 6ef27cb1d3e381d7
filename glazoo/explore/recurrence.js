// Evaluates the recurrence that a program prints, in the notation of glazoo/program/terms.py.
//
// Vectors are columns and numbers 1 x 1 matrices. Side by side is a matrix product, or a number times
// anything; (.), / and powers act entry by entry, with a vector repeated over the columns of a matrix
// and a row over its rows. X_{t-1} is X of the previous token, X_{i-1} of the previous sub-token.

const matrix = (r, c, d = new Float64Array(r * c)) => ({ r, c, d });
const number = x => matrix(1, 1, Float64Array.of(x));
const column = x => matrix(x.length, 1, Float64Array.from(x));
const filled = (r, c, x) => matrix(r, c, new Float64Array(r * c).fill(x));

function identity(n) {
  const out = matrix(n, n);
  for (let i = 0; i < n; i++) out.d[i * n + i] = 1;
  return out;
}

function map(x, f) {
  return matrix(x.r, x.c, x.d.map(f));
}

// Entry by entry, with what has one row or one column repeated.
function zip(x, y, f) {
  const r = Math.max(x.r, y.r), c = Math.max(x.c, y.c), out = matrix(r, c);
  for (const z of [x, y]) {
    if ((z.r !== r && z.r !== 1) || (z.c !== c && z.c !== 1)) {
      throw new Error(`a ${x.r} x ${x.c} matrix does not go with one of ${y.r} x ${y.c}`);
    }
  }
  const [xr, xc, yr, yc] = [x.r > 1 ? x.c : 0, +(x.c > 1), y.r > 1 ? y.c : 0, +(y.c > 1)];
  for (let i = 0, n = 0; i < r; i++) {
    for (let j = 0; j < c; j++, n++) out.d[n] = f(x.d[i * xr + j * xc], y.d[i * yr + j * yc]);
  }
  return out;
}

function transpose(x) {
  const out = matrix(x.c, x.r);
  for (let i = 0; i < x.r; i++) for (let j = 0; j < x.c; j++) out.d[j * x.r + i] = x.d[i * x.c + j];
  return out;
}

function product(x, y) {
  if ((x.r === 1 && x.c === 1) || (y.r === 1 && y.c === 1)) return zip(x, y, (a, b) => a * b);
  if (x.c !== y.r) throw new Error(`no product of ${x.r} x ${x.c} and ${y.r} x ${y.c}`);
  const out = matrix(x.r, y.c);
  for (let i = 0; i < x.r; i++) {
    for (let m = 0; m < x.c; m++) {
      const a = x.d[i * x.c + m];
      for (let j = 0; j < y.c; j++) out.d[i * y.c + j] += a * y.d[m * y.c + j];
    }
  }
  return out;
}

// The triangles of a matrix whose rows are in the order of the largest pivots: L below, U above.
function factor(x) {
  const n = x.r, out = matrix(n, n, x.d.slice()), a = out.d;
  out.order = Array.from({ length: n }, (_, i) => i);
  for (let j = 0; j < n; j++) {
    let pivot = j;
    for (let i = j + 1; i < n; i++) {
      if (Math.abs(a[i * n + j]) > Math.abs(a[pivot * n + j])) pivot = i;
    }
    for (let m = 0; m < n; m++) [a[j * n + m], a[pivot * n + m]] = [a[pivot * n + m], a[j * n + m]];
    [out.order[j], out.order[pivot]] = [out.order[pivot], out.order[j]];
    for (let i = j + 1; i < n; i++) {
      const share = (a[i * n + j] /= a[j * n + j]);
      for (let m = j + 1; m < n; m++) a[i * n + m] -= share * a[j * n + m];
    }
  }
  return out;
}

function solve({ r: n, d: a, order }, y) {
  const out = matrix(n, y.c), x = out.d;
  for (let j = 0; j < y.c; j++) {
    for (let i = 0; i < n; i++) {
      let rest = y.d[order[i] * y.c + j];
      for (let m = 0; m < i; m++) rest -= a[i * n + m] * x[m * y.c + j];
      x[i * y.c + j] = rest;
    }
    for (let i = n - 1; i >= 0; i--) {
      let rest = x[i * y.c + j];
      for (let m = i + 1; m < n; m++) rest -= a[i * n + m] * x[m * y.c + j];
      x[i * y.c + j] = rest / a[i * n + i];
    }
  }
  return out;
}

function diagonal(x) {
  const out = matrix(x.r, x.r);
  for (let i = 0; i < x.r; i++) out.d[i * x.r + i] = x.d[i];
  return out;
}

const FUNCTIONS = {
  exp: x => map(x, Math.exp),
  log: x => map(x, Math.log),
  abs: x => map(x, Math.abs),
  max: (x, y) => zip(x, y, Math.max),
  softsign: x => map(x, a => a / (1 + Math.abs(a))),
  Diag: diagonal,
  norm: x => number(Math.hypot(...x.d)),
  mean: x => number(x.d.reduce((sum, a) => sum + a, 0) / x.d.length),
  phi: x => map(x, a => (a === 0 ? 1 : -Math.expm1(-a) / a)),
};

const BINARY = {
  "+": (x, y) => zip(x, y, (a, b) => a + b),
  "-": (x, y) => zip(x, y, (a, b) => a - b),
  "/": (x, y) => zip(x, y, (a, b) => a / b),
  "(.)": (x, y) => zip(x, y, (a, b) => a * b),
  "^": (x, y) => zip(x, y, Math.pow),
  " ": product,
};

const TOKEN = /\s*(\(\.\)|\^T|\^2|\^-1|\^|[-+/()[\],]|\d+(?:\.\d+)?(?:e[-+]?\d+)?|[A-Za-z]+(?:_[A-Za-z]+)*'?(?:_(?:[ti]\b|\{[ti]-1\}))?)/y;

// A node of a formula: a function of nodes, the name of a value, or a row of one node per sub-token.
const node = (apply, ...of) => ({ apply, of });

function parse(text) {
  const tokens = [];
  for (TOKEN.lastIndex = 0; TOKEN.lastIndex < text.length;) {
    const at = TOKEN.lastIndex, found = TOKEN.exec(text);
    if (!found) throw new Error(`'${text}' has no meaning from '${text.slice(at)}'`);
    tokens.push(found[1]);
  }
  let at = 0;
  const peek = () => tokens[at] ?? "";
  const take = (...accepted) => (accepted.includes(peek()) ? tokens[at++] : "");
  const need = mark => {
    if (!take(mark)) throw new Error(`'${text}': '${mark}' is missing before '${peek()}'`);
  };

  function sum() {
    let left = take("-") ? node(x => map(x, a => -a), quotient()) : quotient();
    for (let mark; (mark = take("+", "-"));) left = node(BINARY[mark], left, quotient());
    return left;
  }
  function quotient() {
    let left = factors();
    for (let mark; (mark = take("/", "(.)"));) left = node(BINARY[mark], left, factors());
    return left;
  }
  function factors() {
    let left = power();
    while (!["", "+", "-", "/", "(.)", ")", "]", ","].includes(peek())) {
      // An inverse times something is the solution of a system, which loses fewer digits.
      left = left.factored ? node(solve, left.factored, power()) : node(BINARY[" "], left, power());
    }
    return left;
  }
  function power() {
    let base = atom();
    for (let mark; (mark = take("^T", "^2", "^-1", "^"));) {
      if (mark === "^T") base = node(transpose, base);
      else if (mark === "^2") base = node(x => map(x, a => a * a), base);
      else if (mark === "^-1") {
        const factored = node(factor, base);
        base = { ...node(x => solve(x, identity(x.r)), factored), factored };
      }
      else base = node(BINARY["^"], base, atom());
    }
    return base;
  }
  function list(end) {
    const found = [sum()];
    while (take(",")) found.push(sum());
    need(end);
    return found;
  }
  function atom() {
    if (take("(")) {
      const found = sum();
      need(")");
      return found;
    }
    if (take("[")) return { row: list("]"), of: [] };
    const name = tokens[at++] ?? "";
    if (/^\d/.test(name)) {
      const value = number(Number(name));
      return node(() => value);
    }
    if (Object.hasOwn(FUNCTIONS, name)) {
      need("(");
      return node(FUNCTIONS[name], ...list(")"));
    }
    if (!/^[A-Za-z]/.test(name)) throw new Error(`'${text}': cannot read '${name}'`);
    return { name, of: [] };
  }

  const found = sum();
  if (at < tokens.length) throw new Error(`'${text}': left over '${tokens.slice(at).join(" ")}'`);
  return found;
}

const stem = name => name.replace(/_(?:[ti]|\{[ti]-1\})$/, "");
const parts = x => (x.row ?? x.of);

function names(x) {
  return x.name ? [stem(x.name)] : parts(x).flatMap(names);
}

// A node varies if the query has a say in it. What does not vary is computed once for all queries of
// one memory.
function mark(x, varying) {
  for (const part of parts(x)) mark(part, varying);
  x.varies = x.name ? varying.has(stem(x.name)) : parts(x).some(part => part.varies);
  x.kept = [];
}

class Recurrence {
  // `constants` are the values of names without an index, by name.
  constructor(lines, constants) {
    this.constants = constants;
    const head = lines.findIndex(line => line.startsWith("for "));
    this.count = head < 0 ? 1 : Number(lines[head].match(/^for i = 1 to (\d+):$/)[1]);
    const read = line => {
      const [name, formula] = line.trim().split(" = ");
      return { name, stem: stem(name), formula: parse(formula) };
    };
    const inside = lines.filter(line => line.startsWith("    "));
    const first = head < 0 ? lines : lines.slice(0, head);
    const after = head < 0 ? [] : lines.slice(head + 1).filter(line => !line.startsWith("    "));
    [this.first, this.inside, this.after] = [first, inside, after].map(part => part.map(read));
    const all = [...this.first, ...this.inside, ...this.after], varying = new Set(["q"]);
    for (let size = 0; size !== varying.size;) {
      size = varying.size;
      for (const line of all) if (names(line.formula).some(x => varying.has(x))) varying.add(line.stem);
    }
    for (const line of all) mark(line.formula, varying);
  }

  // One token. `state` holds matrices by symbol, `token` those named X_t and, in `parts`, one object
  // per sub-token of those named X_i, and constants of its own. Gives all values, and the last one of
  // every symbol.
  step(state, token, again = false) {
    const values = { ...this.constants, ...token.constants }, last = { ...state };
    for (const [symbol, x] of Object.entries(state)) {
      values[`${symbol}_{t-1}`] = values[`${symbol}_{i-1}`] = x;
    }
    const give = (given, index) => {
      for (const [symbol, x] of Object.entries(given)) values[`${symbol}_${index}`] = last[symbol] = x;
    };
    const assign = (lines, i) => {
      for (const line of lines) {
        if (again && !line.formula.varies) continue;
        values[line.name] = last[line.stem] = this.value(line.formula, values, i, again);
      }
    };
    give(token.values, "t");
    assign(this.first, 0);
    for (let i = 0; i < (this.inside.length ? this.count : 0); i++) {
      const given = token.parts?.[i] ?? {};
      give(given, "i");
      assign(this.inside, i);
      for (const symbol of [...Object.keys(given), ...this.inside.map(line => line.stem)]) {
        values[`${symbol}_{i-1}`] = last[symbol];
      }
    }
    assign(this.after, 0);
    return { values, last };
  }

  // What each token gives of one state, where tokens differ in the query alone.
  *reads(state, tokens) {
    let again = false;
    for (const token of tokens) {
      yield this.step(state, token, again).values;
      again = true;
    }
  }

  value(x, values, i, again) {
    if (!x.varies && again && x.kept[i]) return x.kept[i];
    const found = this.fresh(x, values, i, again);
    if (!x.varies) x.kept[i] = found;
    return found;
  }

  fresh(x, values, i, again) {
    if (x.name) {
      if (!(x.name in values)) throw new Error(`nothing is named '${x.name}'`);
      return values[x.name];
    }
    if (x.row) {
      // 0 and 1 stand for arrays of them.
      const row = x.row.map(part => this.value(part, values, i, again));
      return row.reduce((out, other) => zip(out, other, a => a), row[i]);
    }
    return x.apply(...x.of.map(part => this.value(part, values, i, again)));
  }
}
