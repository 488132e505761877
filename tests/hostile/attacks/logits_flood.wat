;; Reads and ranks the whole logits over and over. Ends when its fuel is burnt.
(module
  (import "realm" "seq_new" (func $seq_new (result i32)))
  (import "realm" "forward" (func $forward (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "logits_read" (func $logits_read (param i32 i32 i32) (result i32)))
  (import "realm" "logits_topk" (func $logits_topk (param i32 i32 i32) (result i32)))
  (memory (export "memory") 8)
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $s i32)
    (local.set $s (call $seq_new)) (drop (call $forward (local.get $s) (i32.const 0) (i32.const 1) (i32.const 0) (i32.const 0)))
    (loop $l (drop (call $logits_read (local.get $s) (i32.const 0) (i32.const 49152))) (drop (call $logits_topk (local.get $s) (i32.const 0) (i32.const 49152))) (br $l)) (unreachable)))
