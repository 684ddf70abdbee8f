// Softmax attention over a cache of fixed capacity, on one instruction set.
//
// The query heads that share keys are rows of one tile, so a block of the cache is read once for all
// of them. The softmax runs online over blocks (Milakov and Gimelshein, arXiv 1805.02867): scores of a
// block exist, never those of the whole cache. Only rows that some query of the tile sees are read.
// Arithmetic is float32; float16 rows are widened block by block.
//
// Nothing here may come from a library's templates: this file is compiled for several instruction
// sets, and the linker keeps one copy of such code for all.
#include "attend.h"

#include <cstdlib>
#include <cstring>
#include <utility>
#ifdef __F16C__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

namespace reattend {
namespace REATTEND_TARGET {
namespace {

constexpr int W = LANES;    // floats of a vector; also how many sums a product keeps in registers
constexpr int TILE = 16;    // query rows of a task
constexpr int BLOCK = 64;   // cache rows of a step
constexpr int SPAN = 1024;  // cache rows of a task where there are few tiles
constexpr float LOW = -1e30f;

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));

inline vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, vf v) { memcpy(p, &v, sizeof(v)); }
inline int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// --- sums of the lanes of W vectors, as one vector ---

template <int L, int SECOND, int... I>
inline vi halves(std::integer_sequence<int, I...>) {
  return vi{((I / (W / 2)) * W + (I % (W / 2)) / (L / 2) * L + I % (L / 2) + SECOND * (L / 2))...};
}

// a and b hold segments of L lanes; the result holds those of a, then those of b, half as long.
template <int L>
inline vf fold(vf a, vf b) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  return __builtin_shuffle(a, b, halves<L, 0>(lanes)) +
         __builtin_shuffle(a, b, halves<L, 1>(lanes));
}

// Lane i of the result is the sum of the lanes of v[i].
inline vf lane_sums(vf* v) {
  for (int i = 0; i < W / 2; i++) v[i] = fold<W>(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < W / 4; i++) v[i] = fold<W / 2>(v[2 * i], v[2 * i + 1]);
  if constexpr (W >= 8)
    for (int i = 0; i < W / 8; i++) v[i] = fold<W / 4>(v[2 * i], v[2 * i + 1]);
  if constexpr (W >= 16)
    for (int i = 0; i < W / 16; i++) v[i] = fold<W / 8>(v[2 * i], v[2 * i + 1]);
  return v[0];
}

// --- products ---

// s[r][j] (+)= q[r] . k[j] for R query rows and all keys of a block; widths are whole vectors.
template <int R>
void scores(const float* q, const float* k, int64_t stride, int64_t width, int64_t keys, float* s,
            bool add) {
  constexpr int K = W / R;
  for (int64_t j = 0; j < keys; j += K) {
    const float* row[K];
    for (int i = 0; i < K; i++) row[i] = k + least(j + i, keys - 1) * stride;
    vf sum[W];
    for (int i = 0; i < W; i++) sum[i] = vf{};
    for (int64_t d = 0; d < width; d += W) {
      vf x[R];
      for (int r = 0; r < R; r++) x[r] = load(q + r * width + d);
      for (int i = 0; i < K; i++) {
        vf y = load(row[i] + d);
        for (int r = 0; r < R; r++) sum[r * K + i] += x[r] * y;
      }
    }
    float found[W];
    store(found, lane_sums(sum));
    for (int r = 0; r < R; r++)
      for (int i = 0; i < K; i++) {
        float* to = s + r * BLOCK + j + i;  // BLOCK is a multiple of K: never past the row
        *to = add ? *to + found[r * K + i] : found[r * K + i];
      }
  }
}

// y[r][c] += sum over j of p[r][j] * v[j][c] for R rows and V vectors of columns.
template <int R, int V>
void weigh(const float* p, const float* v, int64_t stride, int64_t keys, float* y, int64_t width) {
  vf sum[R][V];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < V; n++) sum[r][n] = load(y + r * width + n * W);
  for (int64_t j = 0; j < keys; j++) {
    vf x[V];
    for (int n = 0; n < V; n++) x[n] = load(v + j * stride + n * W);
    for (int r = 0; r < R; r++) {
      vf one = p[r * BLOCK + j] - vf{};
      for (int n = 0; n < V; n++) sum[r][n] += one * x[n];
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < V; n++) store(y + r * width + n * W, sum[r][n]);
}

template <int R>
void values(const float* p, const float* v, int64_t stride, int64_t width, int64_t keys, float* y) {
  int64_t c = 0;
  for (; c + 4 * W <= width; c += 4 * W) weigh<R, 4>(p, v + c, stride, keys, y + c, width);
  for (; c + 2 * W <= width; c += 2 * W) weigh<R, 2>(p, v + c, stride, keys, y + c, width);
  for (; c < width; c += W) weigh<R, 1>(p, v + c, stride, keys, y + c, width);
}

// --- exponentials ---

// e^x for x <= 0, 0 below -87: Cephes' polynomial after taking out a power of two.
inline vf exponential(vf x) {
  vf in = x < -87.0f ? vf{} - 87.0f : x;
  vf power = in * 1.44269504088896341f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  vf whole = (power + magic) - magic;
  vf r = in - whole * 0.693359375f;
  r = r - whole * -2.12194440e-4f;
  vf y = vf{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  vi bits = (__builtin_convertvector(whole, vi) + 127) << 23;
  vf scale;
  memcpy(&scale, &bits, sizeof(scale));
  return x < -87.0f ? vf{} : y * scale;
}

// cap * tanh(s / cap)
inline vf capped(vf s, float cap) {
  vf size = s < 0.0f ? -s : s;
  vf e = exponential(size * (-2.0f / cap));
  vf bent = cap * (1.0f - e) / (1.0f + e);
  return s < 0.0f ? -bent : bent;
}

// --- float16 ---

inline float widen(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  float f;
  if (rest < 0x0400) {  // zero and subnormal numbers
    f = float(rest) * 5.9604644775390625e-08f;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    bits |= sign;
    memcpy(&f, &bits, 4);
    return f;
  }
  uint32_t bits = sign | (rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest + 0x1c000) << 13);
  memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t narrow(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest >= 0x7f800000) return sign | 0x7c00 | (rest > 0x7f800000 ? 0x200 : 0);
  if (rest >= 0x477ff000) return sign | 0x7c00;  // rounds to infinity
  if (rest < 0x38800000) {                       // subnormal: adding 0.5 rounds at 2^-24
    float size;
    memcpy(&size, &rest, 4);
    size += 0.5f;
    memcpy(&rest, &size, 4);
    return sign | (rest - 0x3f000000);
  }
  return sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}

void widen_row(const uint16_t* from, int64_t n, float* to) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; i++) to[i] = widen(from[i]);
}

// --- one task ---

struct Rows {
  const float* at;
  int64_t stride;
};

// `count` rows from `first` as float32 with whole vectors: as they lie, or copied to `room`.
Rows rows_of(const Call& call, const void* base, int64_t first, int64_t count, int64_t width,
             float* room) {
  if (!call.half && width % W == 0) return {(const float*)base + first * width, width};
  int64_t wide = padded(width);
  for (int64_t i = 0; i < count; i++) {
    float* to = room + i * wide;
    if (call.half)
      widen_row((const uint16_t*)base + (first + i) * width, width, to);
    else
      memcpy(to, (const float*)base + (first + i) * width, width * 4);
    for (int64_t c = width; c < wide; c++) to[c] = 0;
  }
  return {room, wide};
}

const void* shifted(const Call& call, const void* base, int64_t numbers) {
  return (const char*)base + numbers * (call.half ? 2 : 4);
}

void write(const Call& call, int64_t row, const float* y, float sum) {
  float factor = sum > 0 ? 1 / sum : 0;
  int64_t n = call.value_width;
  if (call.half) {
    uint16_t* to = (uint16_t*)call.y + row * n;
    for (int64_t c = 0; c < n; c++) to[c] = narrow(y[c] * factor);
  } else {
    float* to = (float*)call.y + row * n;
    for (int64_t c = 0; c < n; c++) to[c] = y[c] * factor;
  }
}

struct Tile {
  int64_t b, g, first, count;  // rows of the group: query head major
};

Tile tile_of(const Call& call, const Cut& cut, int64_t index) {
  int64_t rows = call.heads / call.groups * call.queries;
  int64_t first = index % cut.tiles * TILE, bg = index / cut.tiles;
  return {bg / call.groups, bg % call.groups, first, least(TILE, rows - first)};
}

// Row t of a tile among the B * H * N rows of queries and results.
int64_t row_of(const Call& call, const Tile& tile, int64_t t) {
  int64_t rows = call.heads / call.groups * call.queries;
  return (tile.b * call.groups + tile.g) * rows + tile.first + t;
}

Cut cut(const Call& call) {
  int64_t rows = call.heads / call.groups * call.queries, longest = 1;
  for (int64_t b = 0; b < call.batch; b++) longest = most(longest, call.length[b]);
  Cut made{(rows + TILE - 1) / TILE, 1, TILE * (padded(call.value_width) + 2)};
  if (made.tiles == 1) made.splits = (least(longest, call.capacity) + SPAN - 1) / SPAN;
  return made;
}

// Scores of a block become weights in place; sums, maxima and results so far are brought along.
void soften(const Call& call, float* s, int64_t from, int64_t to, float* y, int64_t width,
            float* top, float* sum) {
  if (from >= to) {
    for (int j = 0; j < BLOCK; j++) s[j] = 0;
    return;
  }
  vf high = vf{} + LOW;
  for (int j = 0; j < BLOCK; j += W) {
    vf x = load(s + j);
    if (call.softcap > 0) x = capped(x, call.softcap);
    store(s + j, x);
  }
  for (int64_t j = 0; j < from; j++) s[j] = LOW;
  for (int64_t j = to; j < BLOCK; j++) s[j] = LOW;
  for (int j = 0; j < BLOCK; j += W) {
    vf x = load(s + j);
    high = x > high ? x : high;
  }
  float now = *top;
  for (int i = 0; i < W; i++) now = high[i] > now ? high[i] : now;
  if (now > *top) {
    float shrink = exponential(vf{} + (*top - now))[0];
    *sum *= shrink;
    for (int64_t c = 0; c < width; c += W) store(y + c, load(y + c) * shrink);
    *top = now;
  }
  vf total = vf{};
  for (int j = 0; j < BLOCK; j += W) {
    vf p = exponential(load(s + j) - now);
    store(s + j, p);
    total += p;
  }
  for (int i = 0; i < W; i++) *sum += total[i];
}

bool run(const Call& call, const Cut& cut, int64_t task, float* partial) {
  Tile tile = tile_of(call, cut, task / cut.splits);
  int64_t span = task % cut.splits, count = tile.count;
  int64_t wide[2] = {padded(call.width[0]), call.parts == 2 ? padded(call.width[1]) : 0};
  int64_t out = padded(call.value_width);
  int64_t room = TILE * (wide[0] + wide[1] + out + BLOCK) + BLOCK * (wide[0] + wide[1] + out);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, room * sizeof(float))) return false;
  float* q[2] = {(float*)memory, (float*)memory + TILE * wide[0]};
  float* y = q[1] + TILE * wide[1];
  float* s = y + TILE * out;
  float* copy[2] = {s + TILE * BLOCK, s + TILE * BLOCK + BLOCK * wide[0]};
  float* value_copy = copy[1] + BLOCK * wide[1];

  // What each query sees: rows first to last of the cache.
  int64_t first[TILE], last[TILE], low = call.capacity, high = 0;
  int64_t length = least(call.length[tile.b], call.capacity);
  for (int64_t t = 0; t < count; t++) {
    int64_t index = call.length[tile.b] - call.queries + (tile.first + t) % call.queries;
    last[t] = least(call.causal ? index : length - 1, length - 1);
    first[t] = most(call.start[tile.b], call.window > 0 ? index - call.window + 1 : 0);
    first[t] = most(first[t], 0);
    if (first[t] <= last[t]) {
      low = least(low, first[t]);
      high = most(high, last[t] + 1);
    }
  }
  if (cut.splits > 1) {
    low = most(low, span * SPAN);
    high = least(high, (span + 1) * SPAN);
  }

  for (int part = 0; part < call.parts; part++) {
    int64_t width = call.width[part];
    for (int64_t t = 0; t < count; t++) {
      float* to = q[part] + t * wide[part];
      const void* from = shifted(call, call.query[part], row_of(call, tile, t) * width);
      if (call.half)
        widen_row((const uint16_t*)from, width, to);
      else
        memcpy(to, from, width * 4);
      for (int64_t c = 0; c < width; c++) to[c] *= call.scale;
      for (int64_t c = width; c < wide[part]; c++) to[c] = 0;
    }
  }
  float top[TILE], sum[TILE];
  for (int64_t t = 0; t < TILE; t++) top[t] = LOW, sum[t] = 0;
  memset(y, 0, TILE * out * sizeof(float));

  int64_t cache = tile.b * call.groups + tile.g;  // which of the B * G caches
  for (int64_t at = low; at < high; at += BLOCK) {
    int64_t keys = least(BLOCK, high - at), row = cache * call.capacity + at;
    Rows block[2], value;
    for (int part = 0; part < call.parts; part++) {
      block[part] = rows_of(call, call.key[part], row, keys, call.width[part], copy[part]);
      int64_t stride = block[part].stride, t = 0;
      bool add = part > 0;
      for (; t + 4 <= count; t += 4)
        scores<4>(q[part] + t * wide[part], block[part].at, stride, wide[part], keys,
                  s + t * BLOCK, add);
      for (; t + 2 <= count; t += 2)
        scores<2>(q[part] + t * wide[part], block[part].at, stride, wide[part], keys,
                  s + t * BLOCK, add);
      for (; t < count; t++)
        scores<1>(q[part] + t * wide[part], block[part].at, stride, wide[part], keys,
                  s + t * BLOCK, add);
    }
    value = call.value == call.key[0]
                ? block[0]
                : rows_of(call, call.value, row, keys, call.value_width, value_copy);
    for (int64_t t = 0; t < count; t++)
      soften(call, s + t * BLOCK, most(first[t] - at, 0), least(last[t] + 1 - at, keys),
             y + t * out, out, top + t, sum + t);
    int64_t t = 0;
    for (; t + 4 <= count; t += 4)
      values<4>(s + t * BLOCK, value.at, value.stride, out, keys, y + t * out);
    for (; t + 2 <= count; t += 2)
      values<2>(s + t * BLOCK, value.at, value.stride, out, keys, y + t * out);
    for (; t < count; t++)
      values<1>(s + t * BLOCK, value.at, value.stride, out, keys, y + t * out);
  }

  for (int64_t t = 0; t < count; t++) {
    if (cut.splits == 1) {
      write(call, row_of(call, tile, t), y + t * out, sum[t]);
      continue;
    }
    float* to = partial + task * cut.partial + t * (out + 2);
    to[0] = top[t], to[1] = sum[t];
    memcpy(to + 2, y + t * out, out * sizeof(float));
  }
  free(memory);
  return true;
}

bool merge(const Call& call, const Cut& cut, int64_t index, const float* partial) {
  Tile tile = tile_of(call, cut, index);
  int64_t out = padded(call.value_width), size = out + 2;
  float* y = (float*)malloc(out * sizeof(float));
  if (!y) return false;
  for (int64_t t = 0; t < tile.count; t++) {
    const float* from = partial + index * cut.splits * cut.partial + t * size;
    float top = LOW, sum = 0;
    for (int64_t k = 0; k < cut.splits; k++) {
      float one = from[k * cut.partial];
      top = one > top ? one : top;
    }
    memset(y, 0, out * sizeof(float));
    for (int64_t k = 0; k < cut.splits; k++) {
      const float* part = from + k * cut.partial;
      float factor = exponential(vf{} + (part[0] - top))[0];
      sum += factor * part[1];
      for (int64_t c = 0; c < out; c++) y[c] += factor * part[2 + c];
    }
    write(call, row_of(call, tile, t), y, sum);
  }
  free(y);
  return true;
}

}  // namespace

extern const Kernels kernels;
#define TEXT2(x) #x
#define TEXT(x) TEXT2(x)
const Kernels kernels{TEXT(REATTEND_TARGET), cut, run, merge};

}  // namespace REATTEND_TARGET
}  // namespace reattend
