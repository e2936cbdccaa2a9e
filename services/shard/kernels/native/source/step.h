// One step of a model: token ids in, logits out, all of it in one parallel region.
//
// Phases follow each other as the layers of a transformer do; a phase shares out its rows, panels or tiles, and nobody
// goes on before it is complete. The residual stream and all sums are float32; what enters a product is rounded to the
// weights' kind. No bit of a row depends on the other rows (R23).
//
// Knows a packed model and a layout of rows; nothing of sequences.
#pragma once

#include <type_traits>

#include "attention.h"
#include "best.h"
#include "layout.h"
#include "model.h"
#include "team.h"

namespace fermata {

// Brings the beginning of what a thread reads next while it waits for the others, when memory would have nothing to do.
class Fetch {
 public:
  explicit Fetch(const void* source) : next_(static_cast<const char*>(source)), end_(next_ + kMost) {}

  void operator()() {
    if (next_ == end_) return pause_briefly();
    prefetch(next_, 0, kAtOnce);
    next_ += kAtOnce;
  }

 private:
  static constexpr long kMost = 256 << 10, kAtOnce = 1024;  // bytes: what the second-level cache can spare; a moment
  const char *next_, *const end_;
};

// What Python holds.
class Stepper {
 public:
  virtual ~Stepper() = default;
  virtual int forward(const Step& step) = 0;  // returns how many tokens could not be computed
};

template <class Weight>
class TypedStepper final : public Stepper {
 public:
  using Element = std::conditional_t<std::is_same_v<Weight, int8_t>, BFloat16, Weight>;

  TypedStepper(const Model& model, int threads)
      : model_(model),
        group_(model.heads / model.kv_heads),
        head_(round_up(model.head_size, kPanel)),
        hidden_stride_(round_up(model.hidden, kPanel)),
        scratch_(threads),
        best_(threads),
        rows_of_threads_(threads),
        rounded_(threads),
        steps_(threads),
        team_(
            threads, model.layer_count * kMostPhases + kOtherPhases, [this](int thread) { steps_[thread] = rows_; },
            [this](Worker& worker) { run(worker); }) {}

  int forward(const Step& step) override {
    team_.run([&] {
      rows_ = layout_.lay_out(step, model_.page, std::max(1, kTileRows / group_));
      reserve(rows_);
      ++step_;
    });
    return static_cast<int>(std::count(rows_.finite, rows_.finite + rows_.rows, 0));
  }

 private:
  static constexpr int kMostPhases = 12, kOtherPhases = 8;  // of a layer; around the layers
  static constexpr int kTileRows = 32;                      // rows of a query tile, all heads of a group together
  static constexpr int kRows = 32;                          // rows that meet a panel at a time
  static constexpr long kFollowing = 4096;          // bytes of the next matrix that are asked for before its phase
  static constexpr size_t kOperandBytes = 1 << 20;  // rows of an operand that stay in the second-level cache

  void reserve(const Rows& step) {
    const int rows = step.rows;
    hidden_.reserve(static_cast<size_t>(rows) * hidden_stride_);
    output_.reserve(static_cast<size_t>(rows) * hidden_stride_);
    normed_.reserve(rows, model_.hidden);
    mixed_.reserve(rows, model_.heads * model_.head_size);
    gated_.reserve(rows, model_.intermediate);
    if (model_.layer_count > 0)
      projected_.reserve(static_cast<size_t>(rows) * model_.layers[0].query_key_value.panel_count * kPanel);
    wide_stride_ = round_up(std::max(model_.intermediate, model_.heads * model_.head_size), kPanel);
    if constexpr (std::is_same_v<Weight, int8_t>) wide_.reserve(static_cast<size_t>(rows) * wide_stride_);
    queries_.reserve(static_cast<size_t>(rows) * model_.heads * head_);
    int most = 0;
    for (int tile = 0; tile < step.tiles; ++tile) most = std::max(most, step.tile_row_count[tile]);
    for (auto& scratch : scratch_) scratch.reserve(most * group_, head_);
    for (auto& best : best_) best.reserve(step.drawn);
    for (auto& row : rounded_) row.reserve(head_);
    for (auto& row : rows_of_threads_) row.reserve(std::max(hidden_stride_, 2 * head_));
  }

  // What every thread does in a step.
  void run(Worker& worker) {
    const Rows& step = steps_[worker.thread];
    embed(worker, step);
    for (int index = 0; index < model_.layer_count; ++index) run_layer(worker, step, index);
    finish(worker, step);
#if defined(FERMATA_AMX)
    TileShape::release();
#endif
  }

  // Row `row` of the residual stream.
  float* hidden(int row) const { return hidden_.data() + static_cast<size_t>(row) * hidden_stride_; }
  float* output(int row) const { return output_.data() + static_cast<size_t>(row) * hidden_stride_; }

  void embed(Worker& worker, const Rows& step) {
    team_.phase(worker, step.rows, [&](int row) {
      const size_t place = static_cast<size_t>(step.token_ids[row]) * model_.hidden;
      float* const target = hidden(row);
      for (int column = 0; column < model_.hidden; ++column) {
        const float value =
            model_.embedding_kind == 0
                ? static_cast<const float*>(model_.embedding)[place + column]
                : bits_of<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(model_.embedding)[place + column])
                                 << 16);
        target[column] = value * model_.embedding_scale;
      }
      std::fill(target + model_.hidden, target + hidden_stride_, 0.0f);
    });
  }

  void run_layer(Worker& worker, const Rows& step, int index) {
    const Layer& layer = model_.layers[index];
    const int rows = step.rows;
    team_.phase(
        worker, rows, [&](int row) { put_normed(worker, normed_, row, row, layer.attention_norm); },
        Fetch(own_panels(worker, layer.query_key_value)));
    const int width = layer.query_key_value.panel_count * kPanel;
    multiply_rows_by(worker, normed_, rows, layer.query_key_value, &layer.output,
                     [&](int row, int column, Floats left, Floats right) {
                       float* const target = projected_.data() + static_cast<size_t>(row) * width + column;
                       store(target, left);
                       store(target + kLanes, right);
                     });
    team_.phase(
        worker, rows, [&](int row) { place_row(worker, step, layer, row); }, Fetch(own_panels(worker, layer.output)));
    team_.phase(
        worker, step.tiles * model_.kv_heads,
        [&](int item) { attend_tile(worker, step, layer, item / model_.kv_heads, item % model_.kv_heads); },
        Fetch(own_panels(worker, layer.output)));
    complete(worker, mixed_, rows, model_.heads * model_.head_size);
    add_product(worker, mixed_, rows, layer.output, &layer.gate_up, layer.post_attention_norm);
    team_.phase(
        worker, rows,
        [&](int row) {
          add_post_normed(worker, row, layer.post_attention_norm);
          put_normed(worker, normed_, row, row, layer.feed_forward_norm);
        },
        Fetch(own_panels(worker, layer.gate_up)));
    multiply_rows_by(worker, normed_, rows, layer.gate_up, &layer.down,
                     [&](int row, int column, Floats gate, Floats up) {
                       put_wide(gated_, row, column / 2, (model_.activation == 0 ? silu(gate) : gelu_tanh(gate)) * up);
                     });
    complete(worker, gated_, rows, model_.intermediate);
    const Linear* const following =
        index + 1 < model_.layer_count ? &model_.layers[index + 1].query_key_value : &model_.head;
    add_product(worker, gated_, rows, layer.down, following, layer.post_feed_forward_norm);
    if (layer.post_feed_forward_norm != nullptr)
      team_.phase(worker, rows, [&](int row) { add_post_normed(worker, row, layer.post_feed_forward_norm); });
  }

  // Root-mean-square normalisation (Zhang and Sennrich 2019) of `values`, which end with zeros up to a whole vector.
  static void normalise(const float* values, int count, float epsilon, const float* weight, float* target) {
    Floats squares{};
    for (int column = 0; column < count; column += kLanes) {
      const Floats value = load(values + column);
      squares += value * value;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / static_cast<float>(count) + epsilon);
    for (int column = 0; column < count; column += kLanes)
      store(target + column, load(values + column) * scale * load(weight + column));
  }

  void put_normed(Worker& worker, Operand<Weight>& operand, int target, int row, const float* weight) {
    float* const values = rows_of_threads_[worker.thread].data();
    normalise(hidden(row), model_.hidden, model_.epsilon, weight, values);
    operand.put_row(target, values, model_.hidden);
  }

  void add_post_normed(Worker& worker, int row, const float* weight) {
    if (weight == nullptr) return;
    float* const values = rows_of_threads_[worker.thread].data();
    normalise(output(row), model_.hidden, model_.epsilon, weight, values);
    for (int column = 0; column < model_.hidden; column += kLanes)
      store(hidden(row) + column, load(hidden(row) + column) + load(values + column));
  }

  // `take(row, column, left, right)` gets the products of each row with 32 columns, bias included. Weights are one
  // stream from memory: behind the last panel of a thread comes its first of the `following` matrix.
  template <class Take>
  void multiply_rows_by(Worker& worker, const Operand<Weight>& operand, int rows, const Linear& linear,
                        const Linear* following, const Take& take) {
    const int fitting = static_cast<int>(kOperandBytes / (linear.inner * sizeof(Element)));
    const int block = std::max(kRows, fitting / kRows * kRows), blocks = (rows + block - 1) / block;
    const int own_end = team_.begin_of(worker.thread + 1, blocks * linear.panel_count);
    team_.phase(worker, blocks * linear.panel_count, [&](int item) {
      const int panel = item % linear.panel_count, begin = item / linear.panel_count * block;
      const int end = std::min(rows, begin + block), column = panel * kPanel;
      const Floats left = linear.bias != nullptr ? load(linear.bias + column) : Floats{};
      const Floats right = linear.bias != nullptr ? load(linear.bias + column + kLanes) : Floats{};
      for (int first = begin; first < end; first += kRows) {
        alignas(64) float sums[kRows * kPanel];
        const int count = std::min(kRows, end - first);
        operand.multiply_panel(linear, panel, first, count, sums, first == begin);
        for (int row = 0; row < count; ++row)
          take(first + row, column, load(sums + row * kPanel) + left, load(sums + row * kPanel + kLanes) + right);
      }
      if (item + 1 == own_end && following != nullptr) prefetch(own_panels(worker, *following), 0, kFollowing);
    });
  }

  // Where the panels of a thread begin.
  const void* own_panels(const Worker& worker, const Linear& linear) const {
    return panel_of<Weight>(linear, team_.begin_of(worker.thread, linear.panel_count));
  }

  // Adds a product to the residual stream, or puts it aside for a norm.
  void add_product(Worker& worker, const Operand<Weight>& operand, int rows, const Linear& linear,
                   const Linear* following, const float* post_norm) {
    multiply_rows_by(worker, operand, rows, linear, following, [&](int row, int column, Floats left, Floats right) {
      float* const target = (post_norm != nullptr ? output(row) : hidden(row)) + column;
      store(target, post_norm != nullptr ? left : load(target) + left);
      store(target + kLanes, post_norm != nullptr ? right : load(target + kLanes) + right);
    });
  }

  // Part of a row of an operand. A row of bytes needs the whole row for its scale: it waits in float32 for `complete`.
  void put_wide(Operand<Weight>& operand, int row, int column, Floats values) {
    if constexpr (std::is_same_v<Weight, int8_t>)
      store(wide_.data() + static_cast<size_t>(row) * wide_stride_ + column, values);
    else
      operand.put(row, column, values);
  }

  // The same for the first `count` values only: what lies behind them is another head's.
  void put_part(Operand<Weight>& operand, int row, int column, Floats values, int count) {
    if (count >= kLanes) return put_wide(operand, row, column, values);
    for (int lane = 0; lane < count; ++lane) {
      if constexpr (std::is_same_v<Weight, int8_t>)
        wide_[static_cast<size_t>(row) * wide_stride_ + column + lane] = values[lane];
      else
        operand.put_one(row, column + lane, values[lane]);
    }
  }

  void complete(Worker& worker, Operand<Weight>& operand, int rows, int count) {
    if constexpr (std::is_same_v<Weight, int8_t>)
      team_.phase(worker, rows, [&](int row) {
        operand.put_row(row, wide_.data() + static_cast<size_t>(row) * wide_stride_, count);
      });
  }

  // Turns the heads of a row and puts queries in order, keys and values into their page.
  void place_row(Worker& worker, const Rows& step, const Layer& layer, int row) {
    const int size = model_.head_size, page = model_.page, position = step.positions[row], slot = position % page;
    const float* const cosine = layer.rotation + static_cast<size_t>(position) * size;
    const float* const sine = cosine + size / 2;
    const float* heads = projected_.data() + static_cast<size_t>(row) * layer.query_key_value.panel_count * kPanel;
    float *const head = rows_of_threads_[worker.thread].data(), *const turned = head + head_;
    Element* const rounded = rounded_[worker.thread].data();
    std::fill(turned + size, turned + head_, 0.0f);
    const auto turn = [&](const float* source, const float* norm, float scale) {
      std::memset(head, 0, head_ * sizeof(float));
      std::memcpy(head, source, size * sizeof(float));
      if (norm != nullptr) normalise(head, size, model_.epsilon, norm, head);
      turn_head(size, head, cosine, sine, scale, turned);
    };
    for (int index = 0; index < model_.heads; ++index, heads += size) {
      turn(heads, layer.query_norm, model_.attention_scale);
      Element* const target = query(step, index / group_, row) + static_cast<size_t>(index % group_) * head_;
      for (int column = 0; column < head_; column += kLanes) store(target + column, load(turned + column));
    }
    constexpr int pair = kPair<Element>;
    for (int index = 0; index < model_.kv_heads; ++index, heads += size) {
      const size_t place = page_place(step.row_blocks[row], index);
      turn(heads, layer.key_norm, 1.0f);
      for (int column = 0; column < head_; column += kLanes) store(rounded + column, load(turned + column));
      Element* const keys = static_cast<Element*>(layer.keys) + place + slot * pair;
      for (int column = 0; column < head_; column += pair)
        std::memcpy(keys + static_cast<size_t>(column) * page, rounded + column, pair * sizeof(Element));
      std::memcpy(head, heads + static_cast<size_t>(model_.kv_heads) * size, size * sizeof(float));
      for (int column = 0; column < head_; column += kLanes) store(rounded + column, load(head + column));
      Element* const values =
          static_cast<Element*>(layer.values) + place + static_cast<size_t>(slot / pair) * head_ * pair + slot % pair;
      for (int column = 0; column < size; ++column) values[static_cast<size_t>(column) * pair] = rounded[column];
    }
  }

  // Rotary position embedding (Su et al. 2021), halves of a head paired.
  static void turn_head(int size, const float* __restrict head, const float* __restrict cosine,
                        const float* __restrict sine, float scale, float* __restrict turned) {
    const int half = size / 2;
    for (int pair = 0; pair < half; ++pair) {
      const float first = head[pair], second = head[pair + half];
      turned[pair] = (first * cosine[pair] - second * sine[pair]) * scale;
      turned[pair + half] = (second * cosine[pair] + first * sine[pair]) * scale;
    }
  }

  // Queries of one key-value head lie row by row, so that those of a tile are a matrix.
  Element* query(const Rows& step, int kv_head, int row) const {
    return queries_.data() + (static_cast<size_t>(kv_head) * step.rows + row) * group_ * head_;
  }

  size_t page_place(int block, int kv_head) const {
    return (static_cast<size_t>(block) * model_.kv_heads + kv_head) * head_ * model_.page;
  }

  void attend_tile(Worker& worker, const Rows& step, const Layer& layer, int tile, int kv_head) {
    const int first = step.tile_first_row[tile], rows = step.tile_row_count[tile] * group_, size = model_.head_size;
    auto& scratch = scratch_[worker.thread];
    const size_t place = page_place(0, kv_head);
    attend<Element>({static_cast<const Element*>(layer.keys) + place, static_cast<const Element*>(layer.values) + place,
                     page_place(1, 0), step.tables + step.tile_table[tile], model_.page, head_},
                    query(step, kv_head, first), rows, group_, step.positions + first, Window{layer.window},
                    model_.attention_softcap, scratch);
    for (int row = 0; row < rows; ++row) {
      const Floats factor = all(1.0f / scratch.masses[row]);
      const float* const total = &scratch.total[static_cast<size_t>(row) * head_];
      const int column = (kv_head * group_ + row % group_) * size;
      for (int index = 0; index < size; index += kLanes)
        put_part(mixed_, first + row / group_, column + index, load(total + index) * factor, size - index);
    }
  }

  // The final norm, the head, and the best id of each row.
  void finish(Worker& worker, const Rows& step) {
    team_.phase(worker, step.rows, [&](int row) {
      Floats wrong{};
      for (int column = 0; column < model_.hidden; column += kLanes) {
        const Floats value = load(hidden(row) + column);
        wrong += value - value;  // not zero where it is not finite
      }
      step.finite[row] = sum(wrong) == 0.0f;
    });
    team_.phase(worker, step.drawn,
                [&](int index) { put_normed(worker, normed_, index, step.drawn_rows[index], model_.norm); });
    auto& best = best_[worker.thread];
    const float softcap = model_.logit_softcap;
    multiply_rows_by(worker, normed_, step.drawn, model_.head, nullptr,
                     [&](int row, int column, Floats left, Floats right) {
                       if (softcap > 0.0f) {
                         left = softcap * hyperbolic_tangent(left / softcap);
                         right = softcap * hyperbolic_tangent(right / softcap);
                       }
                       best.begin(step_, step.drawn);
                       best.see(row, column, left, model_.vocabulary);
                       best.see(row, column + kLanes, right, model_.vocabulary);
                       if (step.wants_logits[row]) put_logits(step, row, column, left, right);
                     });
    team_.phase(worker, step.drawn, [&](int row) {
      step.best[row] = Best::of(best_, step_, row);
      if (!step.finite[step.drawn_rows[row]]) step.best[row] = -1;
    });
  }

  void put_logits(const Rows& step, int row, int column, Floats left, Floats right) const {
    alignas(64) float values[kPanel];
    store(values, left);
    store(values + kLanes, right);
    const int count = std::min(kPanel, model_.vocabulary - column);
    std::memcpy(step.logits + static_cast<size_t>(row) * model_.vocabulary + column, values, count * sizeof(float));
  }

  const Model model_;
  const int group_, head_, hidden_stride_;
  int wide_stride_ = 0;
  long step_ = 0;
  Layout layout_;
  Rows rows_{};
  Buffer<float> hidden_, output_, projected_, wide_;
  Buffer<Element> queries_;
  Operand<Weight> normed_, mixed_, gated_;
  std::vector<AttentionScratch<Element>> scratch_;
  std::vector<Best> best_;
  std::vector<Buffer<float>> rows_of_threads_;
  std::vector<Buffer<Element>> rounded_;
  std::vector<Rows> steps_;  // of each thread: a late one still has those of its own step
  Team team_;                // last: its threads end before what they use
};

}  // namespace fermata
