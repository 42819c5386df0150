// Float32 matmuls of masked_patch_embed on the CPU; included once for each instruction set
// (cpu/levels.h), after cpu/vectors.h (see there).
//
// The right factor of a product is read from panels: kPanel of its columns, contiguous. They are
// made once a call from the weight, and once a chunk of rows from the patches, for the gradient of
// the weight. A task multiplies kBlock rows of the left factor, which stay in the second-level
// cache, with kGroup panels.

constexpr int64_t kPanel = 2 * kWidth;
constexpr int64_t kBlock = 48;  // a multiple of kTileRows
constexpr int64_t kGroup = 8;

inline int64_t panel_columns() { return kPanel; }
inline int64_t block_rows() { return kBlock; }

// How many tasks there are: blocks of rows, times groups of panels.
inline int64_t tasks_of(int64_t rows, int64_t columns) {
  return ceil_div(rows, kBlock) * ceil_div(columns, kGroup * kPanel);
}

// The columns of p.c are written up to a multiple of kWidth.
inline void multiply_tasks(const Product& p, int64_t begin, int64_t end) {
  const int64_t groups = ceil_div(p.columns, kGroup * kPanel);
  for (int64_t task = begin; task < end; task++) {
    const int64_t block = task / groups, first = block * kBlock;
    const int64_t rows = p.rows - first < kBlock ? p.rows - first : kBlock;
    const int64_t start = task % groups * kGroup * kPanel;
    for (int64_t n = start; n < p.columns && n < start + kGroup * kPanel; n += kPanel) {
      const int64_t left = ceil_div(p.columns - n, kWidth) * kWidth;
      const auto run = p.add ? multiply<true> : multiply<false>;
      run(rows, left < kPanel ? left : kPanel, p.depth, p.a + block * p.a_block, p.a_row, p.a_depth,
          p.panels + n * p.depth, kPanel, p.c + first * p.c_row + n, p.c_row);
    }
  }
}

// Panels of the transpose of x [columns, depth]: panel[k][n] = x[first + n][k].
inline void panels_of_transpose(const float* x, int64_t columns, int64_t depth, float* panels,
                                int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * kPanel, count = columns - first < kPanel ? columns - first : kPanel;
    const float* const from = x + first * depth;
    float* const to = panels + first * depth;
    const int64_t whole = count / 8 * 8, steps = depth / 8 * 8;
    transpose(from, whole, steps, depth, to, kPanel);
    for (int64_t k = 0; k < depth; k++) {
      for (int64_t n = k < steps ? whole : 0; n < kPanel; n++) {
        to[k * kPanel + n] = n < count ? from[n * depth + k] : 0.0f;
      }
    }
  }
}

// Panels of x [depth, columns]: panel[k][n] = x[k][first + n].
inline void panels_of(const float* x, int64_t columns, int64_t depth, float* panels, int64_t begin,
                      int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * kPanel, count = columns - first < kPanel ? columns - first : kPanel;
    for (int64_t k = 0; k < depth; k++) {
      float* const to = panels + first * depth + k * kPanel;
      if (count == kPanel) {
        memcpy(to, x + k * columns + first, kPanel * sizeof(float));
      } else {
        for (int64_t n = 0; n < kPanel; n++) to[n] = n < count ? x[k * columns + first + n] : 0.0f;
      }
    }
  }
}

// Blocks of the transpose of x [depth, rows], as a left factor: block[k][m] = x[k][first + m].
inline void blocks_of_transpose(const float* x, int64_t rows, int64_t depth, float* blocks,
                                int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i++) {
    const int64_t first = i * kBlock, count = rows - first < kBlock ? rows - first : kBlock;
    for (int64_t k = 0; k < depth; k++) {
      memcpy(blocks + (i * depth + k) * kBlock, x + k * rows + first, count * sizeof(float));
    }
  }
}
