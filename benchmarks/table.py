"Rows of speed.py as a printed table, plain or Markdown."

NETWORK = ('times diffusers', 'target', 'GFLOP/image', 'GFLOP/s', 'utilization', 'target')
HEADS = {
    'training': ('training step', 'precision', '', 'ms/image', *NETWORK),
    'sampling': ('sampling step', 'precision', '', 'ms/image a step', *NETWORK),
    'data': ('data path', '', 'ms/batch', 'share of a training step'),
    'share': ('neither convolution nor matrix product', '', 'share', 'of what'),
    'memory': ('peak memory of training', '', 'MB', 'of diffusers', 'target'),
    'processes': ('command line', '', 'steps/s', 'times one process')}

def percent(x): return '' if x is None else f"{100*x:.0f}%"

def number(r, key, fmt='{:.1f}', by=1):
    "A value of the row, or nothing where it has none."
    return fmt.format(r[key]*by) if r.get(key) is not None else ''

def skipped_cells(r):
    "A row that was not measured: its name, and why."
    why = ', '.join(filter(None, (r['note'], f"skipped: {r['skipped']}")))
    return [r['what'], *([r['precision']] if 'precision' in r else []), why]

def network_cells(r):
    "A row of training or sampling."
    rounds = f"(batch {r['batch']}, {len(r['times'])}x)" if 'times' in r else ''
    note = r['note'] + ' '*bool(r['note']) + rounds
    ratio, use = r.get('target') or (None, None)
    gflops = number(r, 'gflops', '{:.0f}' if r['gflops'] > 20 else '{:.1f}')
    return [r['what'], r['precision'], note, number(r, 'seconds', by=1e3),
            number(r, 'ratio', '{:.2f}'), f"{ratio:.2f}" if ratio else '',
            number(r, 'gflop'), gflops, percent(r['utilization']), percent(use)]

def data_cells(r):
    "A row of the data path."
    share = f"{100*r['share']:.2f}%"
    return [r['what'], f"batch {r['batch']}", number(r, 'seconds', '{:.2f}', 1e3), share]

def share_cells(r):
    "A row of what is neither convolution nor matrix product, its parts by size."
    rest = {k: v for k, v in r['parts'].items() if k not in ('convolution', 'matrix product')}
    parts = sorted(rest.items(), key=lambda kv: -kv[1])
    return [r['what'], f"{r['note']}{r['note'] and ', '}batch {r['batch']}", percent(r['share']),
            ', '.join(f"{k} {100*v:.1f}%" for k, v in parts)]

def memory_cells(r):
    "A row of peak memory."
    return [r['what'], f"{r['note']}, batch {r['batch']}", number(r, 'bytes', '{:,.0f}', 1e-6),
            number(r, 'ratio', '{:.2f}'), number(r, 'target', '{:.2f}')]

def process_cells(r):
    "A row of the command line."
    return [r['what'], f"{r['note']}, batch {r['batch']}", f"{1/r['seconds']:.3f}",
            number(r, 'ratio', '{:.2f}')]

CELLS = {'training': network_cells, 'sampling': network_cells, 'data': data_cells,
         'share': share_cells, 'memory': memory_cells, 'processes': process_cells}

def print_table(group, rows, markdown):
    "One group of rows, as text or as Markdown."
    head = HEADS[group]
    body = [skipped_cells(r) if 'skipped' in r else CELLS[group](r) for r in rows]
    body = [(c + ['']*len(head))[:len(head)] for c in body]
    if markdown:
        for line in (head, ['---']*len(head), *body): print('| ' + ' | '.join(line) + ' |')
    else:
        width = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        for line in (head, *body):
            padded = [v.ljust(w) if i < 3 or len(head) < 6 else v.rjust(w)
                      for i, (v, w) in enumerate(zip(line, width))]
            print('  '.join(padded).rstrip())
    print(flush=True)
