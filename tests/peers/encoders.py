"""Makes micro encoders with random weights, and what transformers computes with them: last hidden states,
or a reranker's scores. For `QCONV_REFERENCES=DIR cargo test --release --test reference_logits -- --ignored`.

    python tests/peers/encoders.py DIR [NAME ...]

Needs torch, transformers 5, tokenizers and sentencepiece.
"""
import json, os, sys, torch, transformers as T
from tokenizers import Tokenizer, models, trainers, pre_tokenizers, decoders, processors, normalizers
from safetensors.torch import save_file
T.logging.set_verbosity_error()
FIXTURES = os.path.join(os.path.dirname(os.path.abspath(__file__)), '../../fixtures')
root, text = sys.argv[1], FIXTURES + '/tiny-llama/calibration.txt'
os.makedirs(root, exist_ok=True)
SENT = "The quick brown fox jumps over 13 lazy dogs."
def unigram():
    from sentencepiece import sentencepiece_model_pb2 as pb
    p = pb.ModelProto(); p.ParseFromString(open(FIXTURES + '/models/t5/spiece.model','rb').read())
    t = Tokenizer(models.Unigram()); t.normalizer = normalizers.Precompiled(p.normalizer_spec.precompiled_charsmap)
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]); t.decoder = decoders.Metaspace()
    t.train([text], trainers.UnigramTrainer(vocab_size=300, special_tokens=['<s>','<pad>','</s>','<unk>','<mask>'], unk_token='<unk>', show_progress=False))
    j = json.loads(t.to_str()); j['model']['unk_id'] = 3; t = Tokenizer.from_str(json.dumps(j))
    t.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=True)
    return T.PreTrainedTokenizerFast(tokenizer_object=t, bos_token='<s>', eos_token='</s>', sep_token='</s>', cls_token='<s>', unk_token='<unk>', pad_token='<pad>', mask_token='<mask>')
def bpe(specials, cls, sep, pad, mask, unk, post):
    t = Tokenizer(models.BPE()); t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False); t.decoder = decoders.ByteLevel()
    t.train([text], trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.post_processor = post(t)
    return T.PreTrainedTokenizerFast(tokenizer_object=t, cls_token=cls, sep_token=sep, pad_token=pad, mask_token=mask, unk_token=unk, **({'bos_token': cls, 'eos_token': sep} if cls == '<s>' else {}))
def roberta():
    return bpe(['<s>','<pad>','</s>','<unk>','<mask>'], '<s>','</s>','<pad>','<mask>','<unk>', lambda t: processors.RobertaProcessing(('</s>', 2), ('<s>', 0), trim_offsets=True, add_prefix_space=False))
def modern():
    return bpe(['[UNK]','[CLS]','[SEP]','[PAD]','[MASK]'], '[CLS]','[SEP]','[PAD]','[MASK]','[UNK]', lambda t: processors.TemplateProcessing(single='[CLS]:0 $A:0 [SEP]:0', pair='[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1', special_tokens=[('[CLS]',1),('[SEP]',2)]))
def wordpiece():
    return T.BertTokenizerFast.from_pretrained(FIXTURES + '/models/bert')
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=130)
ids3 = dict(id2label={0:'good',1:'bad',2:'ugly'}, label2id={'good':0,'bad':1,'ugly':2})
xl = dict(small, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1, layer_norm_eps=1e-5)
mb = dict(small, num_hidden_layers=4, local_attention=8, global_attn_every_n_layers=3, pad_token_id=3, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
A = {
 'xlm-roberta': ('XLMRobertaModel', 'XLMRobertaConfig', xl, unigram),
 'xlm-roberta-rank': ('XLMRobertaForSequenceClassification', 'XLMRobertaConfig', dict(xl, id2label={0:'LABEL_0'}, label2id={'LABEL_0':0}), unigram),
 'roberta': ('RobertaModel', 'RobertaConfig', xl, roberta),
 'camembert': ('CamembertModel', 'CamembertConfig', xl, unigram),
 'distilbert': ('DistilBertModel', 'DistilBertConfig', dict(dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=130, pad_token_id=0), wordpiece),
 'bert-rank': ('BertForSequenceClassification', 'BertConfig', dict(small, **ids3), wordpiece),
 'modern-bert': ('ModernBertModel', 'ModernBertConfig', mb, modern),
 'modern-bert-rank': ('ModernBertForSequenceClassification', 'ModernBertConfig', dict(mb, classifier_pooling='mean', **ids3), modern),
 'eurobert': ('EuroBertModel', 'EuroBertConfig', dict(small, num_key_value_heads=2, head_dim=8, pad_token_id=3, bos_token_id=1, eos_token_id=2, mask_token_id=4), modern),
 'nomic': ('NomicBertModel', 'NomicBertConfig', dict(small, head_dim=8), wordpiece),
 'gemma-embedding': ('Gemma3TextModel', 'Gemma3TextConfig', dict(small, num_hidden_layers=7, head_dim=8, num_key_value_heads=2, sliding_window=16, use_bidirectional_attention=True, query_pre_attn_scalar=8, pad_token_id=3, bos_token_id=1, eos_token_id=2), modern),
}
only = sys.argv[2:]
for name, (cls, cfg, kw, tok) in A.items():
    if only and name not in only: continue
    try:
        t = tok(); d = f'{root}/{name}'
        torch.manual_seed(7)
        m = getattr(T, cls)(getattr(T, cfg)(vocab_size=len(t), **kw)).eval()
        with torch.no_grad():
            for n, p in m.named_parameters():
                if p.dim() == 1: p.add_(torch.randn_like(p) * 0.1)
                else: p.mul_(4.0)
        m = m.to(torch.bfloat16); m.save_pretrained(d); t.save_pretrained(d)
        m = getattr(T, cls).from_pretrained(d, dtype=torch.float32, attn_implementation='eager').eval()
        i = t(SENT, return_tensors='pt')
        with torch.no_grad(): o = m(**{k: v for k, v in i.items() if k != 'token_type_ids' or 'bert' == name[:4]})
        key = 'last_hidden_state' if hasattr(o, 'last_hidden_state') and o.last_hidden_state is not None else 'logits'
        v = o[key][0].float().contiguous()
        save_file({'input_ids': i.input_ids[0].to(torch.int64), key: v}, d + '/reference_logits.safetensors')
        print('OK', name, key, list(v.shape), 'spread %.3f' % v.std().item(), i.input_ids[0].tolist()[:6])
    except Exception as e:
        print('FAIL', name, type(e).__name__, str(e)[:200])
