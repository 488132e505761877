;; Renders a conversation of 4,096 messages again and again. Ends when its fuel is burnt.
(module
  (import "realm" "chat_template" (func $chat_template (param i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 5)
  (data (i32.const 0x40000) "{\22role\22:\22a\22,\22content\22:\22b\22},")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $i i32) (local $a i32)
    (i32.store8 (i32.const 0) (i32.const 91)) (local.set $a (i32.const 1))
    (loop $l
      (memory.copy (local.get $a) (i32.const 0x40000) (i32.const 27)) (local.set $a (i32.add (local.get $a) (i32.const 27)))
      (br_if $l (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 4096))))
    (i32.store8 (i32.sub (local.get $a) (i32.const 1)) (i32.const 93))
    (loop $m (br_if $m (i32.ge_s (call $chat_template (i32.const 0) (local.get $a) (i32.const 1) (i32.const 0) (i32.const 0)) (i32.const 0)))) (i32.const -1)))
