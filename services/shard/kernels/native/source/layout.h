// Where the rows of a step lie: from the chunks of a batch to rows, query tiles and the rows that draw.
//
// Knows block tables and counts; nothing of models.
#pragma once

#include <algorithm>
#include <vector>

#include "model.h"

namespace fermata {

// Rows are tokens; the rows of a sequence lie side by side in the order of their positions. What pointers point to
// belongs to a `Layout`, or to the caller of the step.
struct Rows {
  const int32_t* token_ids;       // [rows]
  const int32_t* positions;       // [rows]
  const int32_t* row_blocks;      // [rows], block that takes the row's key and value
  const int32_t* tables;          // block tables of all sequences, one behind the other
  const int32_t* tile_first_row;  // [tiles], query tiles: rows of one sequence
  const int32_t* tile_row_count;  // [tiles]
  const int32_t* tile_table;      // [tiles], where the sequence's table begins
  const int32_t* drawn_rows;      // [drawn], rows whose logits are wanted
  const uint8_t* wants_logits;    // [drawn]
  float* logits;                  // [drawn, vocabulary]
  int32_t* best;                  // [drawn]
  uint8_t* finite;                // [rows]
  int rows, tiles, drawn;
};

class Layout {
 public:
  // `page`: positions per block; a tile has at most `tile_rows` rows. No result depends on that.
  Rows lay_out(const Step& step, int page, int tile_rows) {
    for (auto* each : {&positions_, &row_blocks_, &tile_first_row_, &tile_row_count_, &tile_table_, &drawn_rows_})
      each->clear();
    int table = 0;
    for (const Chunk* chunk = step.chunks; chunk != step.chunks + step.chunk_count; ++chunk) {
      const int first = static_cast<int>(positions_.size());
      for (int position = chunk->start; position < chunk->start + chunk->tokens; ++position) {
        positions_.push_back(position);
        row_blocks_.push_back(step.tables[table + position / page]);
      }
      for (int done = 0; done < chunk->tokens; done += tile_rows) {
        tile_first_row_.push_back(first + done);
        tile_row_count_.push_back(std::min(chunk->tokens - done, tile_rows));
        tile_table_.push_back(table);
      }
      if (chunk->draws) drawn_rows_.push_back(first + chunk->tokens - 1);
      table += chunk->blocks;
    }
    return {step.token_ids,
            positions_.data(),
            row_blocks_.data(),
            step.tables,
            tile_first_row_.data(),
            tile_row_count_.data(),
            tile_table_.data(),
            drawn_rows_.data(),
            step.wants_logits,
            step.logits,
            step.best,
            step.finite,
            static_cast<int>(positions_.size()),
            static_cast<int>(tile_first_row_.size()),
            static_cast<int>(drawn_rows_.size())};
  }

 private:
  std::vector<int32_t> positions_, row_blocks_, tile_first_row_, tile_row_count_, tile_table_, drawn_rows_;
};

}  // namespace fermata
